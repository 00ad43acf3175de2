"""What a refused command says."""


def refused(answer: tuple[int, str, str], *words: str) -> None:
    code, out, err = answer
    assert code == 2
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("perturbed: error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in line, line
