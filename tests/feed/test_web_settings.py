"""Where the server listens, and what is refused before it does."""

import pytest

from perturbed.errors import PerturbedError
from perturbed.feed import commands
from perturbed.feed.web.settings import Settings, is_loopback, linked


def settings(tmp_path, **more):
    return Settings(database=tmp_path / "f", owner_token="x", **more)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "papers.lan", "127.0.0.1.example.org"])
def test_a_host_that_others_reach_needs_a_public_address(tmp_path, host):
    with pytest.raises(PerturbedError, match=r"without encryption.*--public-url https"):
        settings(tmp_path, host=host)
    assert settings(tmp_path, host=host, public_url="https://papers.example.org").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_loopback_needs_none(tmp_path, host):
    assert is_loopback(host)
    assert settings(tmp_path, host=host).base.startswith("http://")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://papers.example.org",
            "papers.example.org",
            "https://",
            "https://a/b",
            "https://u:p@a",
            "https://a?x=1",
        ),
        *(
            "https://a:port",
            "https://a:0",
            "https://a:99999",
            "https://[::1",
            "https://a b",
            "https://é.org",
        ),
        "javascript:alert(1)",
    ],
)
def test_the_public_address_is_https_and_a_host_alone(tmp_path, url):
    for check in (linked, lambda url: settings(tmp_path, public_url=url)):
        with pytest.raises(PerturbedError, match="--public-url"):
            check(url)


def test_links_in_mail_may_lead_to_this_machine_or_to_the_public_address():
    assert linked("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"
    assert linked("http://[::1]:8000") == "http://[::1]:8000"
    assert linked("https://Papers.example.org/") == "https://papers.example.org"


@pytest.mark.parametrize("url", ["papers.example.org", "javascript:alert(1)", "http://papers.example.org"])
def test_the_commands_that_mail_check_what_links_begin_with(tmp_path, monkeypatch, url):
    monkeypatch.setenv("PERTURBED_SMTP", "smtp://127.0.0.1:9")
    monkeypatch.setenv("PERTURBED_MAIL_FROM", "papers@example.org")
    (tmp_path / "f").touch()
    with pytest.raises(PerturbedError, match="--public-url"):
        commands.subscribe("ann@example.org", public_url=url, database=tmp_path / "f")
    with pytest.raises(PerturbedError, match="--public-url"):
        commands.digest(public_url=url, database=tmp_path / "f")


def test_names_and_origins(tmp_path):
    own = settings(tmp_path, port=8123)
    assert own.hosts == {"127.0.0.1:8123", "localhost:8123", "[::1]:8123"}
    assert own.origins == {"http://127.0.0.1:8123", "http://localhost:8123", "http://[::1]:8123"}
    assert own.base == "http://127.0.0.1:8123"
    public = settings(tmp_path, host="0.0.0.0", port=8123, public_url="https://Papers.example.org/")
    assert public.hosts == own.hosts | {"papers.example.org"}
    assert public.origins == own.origins | {"https://papers.example.org"}
    assert public.base == "https://papers.example.org"
    assert settings(tmp_path, public_url="https://papers.example.org:443").base == "https://papers.example.org"
    assert settings(tmp_path, host="::1").local == "http://[::1]:8000"


def test_the_token_is_not_in_the_repr(tmp_path):
    assert "hidden-token" not in repr(Settings(database=tmp_path, owner_token="hidden-token"))


def test_a_proxy_is_an_address(tmp_path):
    settings(tmp_path, trusted_proxies=("10.0.0.0/8", "::1"))
    with pytest.raises(PerturbedError, match="--trusted-proxy everybody"):
        settings(tmp_path, trusted_proxies=("everybody",))
