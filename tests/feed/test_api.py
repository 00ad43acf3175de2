"""The JSON interface: what its description promises, it keeps."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from web_parts import HERE, NOW, OURS, add, app_of, papers, visitor

from perturbed.evidence import ledger
from perturbed.feed import export, store
from perturbed.feed.web.app import create_app
from perturbed.feed.web.settings import Settings


@pytest.fixture
def app(tmp_path):
    app = app_of(tmp_path)
    add(app, *papers())
    app.state.limiter.wait = lambda *_: 0.0
    return app


CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


PATHS = ("/api/papers", "/api/papers/{key}", "/api/search", "/api/evidence/{slug}")


@pytest.mark.parametrize("path", PATHS)
def test_any_request_is_answered_as_described(app, path):
    described = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"Host": "127.0.0.1:8000"})

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=described[path]["GET"].as_strategy() | described[path]["GET"].as_strategy(GenerationMode.NEGATIVE))
    def holds(case):
        case.call_and_validate(base_url=HERE, headers={"Host": "127.0.0.1:8000", **OURS}, checks=list(CHECKS))

    holds()


def test_the_description_names_everything_and_no_page(app):
    described = visitor(app).get("/api/openapi.json").json()
    assert set(described["paths"]) == set(PATHS)
    assert all(set(path) == {"get"} for path in described["paths"].values())
    for path in ("/docs", "/redoc"):
        assert visitor(app).get(path).status_code == 404  # they load a third party's script


def test_papers_by_day(app):
    client = visitor(app)
    day = client.get("/api/papers", params={"first": "2025-11-17", "last": "2025-11-17"}).json()
    assert day["total"] == 2
    assert [paper["key"] for paper in day["papers"]] == ["2511.09001", "2511.09002"]
    everything, offset = [], 0
    while part := client.get("/api/papers", params={"limit": 40, "offset": offset}).json()["papers"]:
        everything += part
        offset += 40
    assert len({paper["key"] for paper in everything}) == 90
    assert client.get("/api/papers?limit=101").status_code == 422


@pytest.mark.parametrize(
    "told", ["yesterday", "0.0", "1763337600", "20251117", "2025-11-17T00:00:00", "2025-11-31", ""]
)
@pytest.mark.parametrize("name", ["first", "last"])
def test_a_day_is_written_in_one_way(app, name, told):
    assert visitor(app).get("/api/papers", params={name: told}).status_code == 422


@pytest.mark.parametrize("told", ["5.0", "+5", " 5", "1_0", "05", "٥", "0", "101", "-1", "1e1", ""])
def test_a_number_is_written_in_one_way(app, told):
    assert visitor(app).get("/api/papers", params={"limit": told}).status_code == 422


def test_so_is_the_offset_of_a_search(app):
    for told, code in (("5", 200), ("+5", 422), ("1_0", 422), ("5.0", 422)):
        assert visitor(app).get("/api/search", params={"q": "sheep", "offset": told}).status_code == code


def test_a_paper_has_the_fields_of_the_export(app):
    """The same names and values as `perturbed feed export --json`, where both have them."""
    exported = {paper["key"]: paper for paper in export.as_json(app.state.feed.database.read())}
    client = visitor(app)
    for key in ("2511.09001", "2406.02214"):
        told = client.get(f"/api/papers/{key}").json()
        shared = set(told) & set(exported[key])
        assert {"title", "published", "authors", "comments", "upvotes", "arxiv", "slug", "year", "sites"} <= shared
        assert {name: told[name] for name in shared} == {name: exported[key][name] for name in shared}


def test_other_names_and_none(app):
    client = visitor(app)
    assert client.get("/api/papers/sltrain").json()["arxiv"] == "2406.02214"
    answer = client.get("/api/papers/nothing")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"detail"}


def test_evidence_is_the_newest_registered_record(app):
    client = visitor(app)
    told = client.get("/api/evidence/pag").json()
    kept = ledger.latest("pag")
    assert told["hash"] == kept["hash"]
    assert told["verdict"]["word"] == kept["verdict"]
    assert told["effect"] == pytest.approx(kept["arms"][kept["primary"]]["effect"])
    assert client.get("/api/evidence/ul-nothing").status_code == 404


def test_search_gives_pieces_and_not_markup(app):
    found = visitor(app).get("/api/search", params={"q": "sheep"}).json()
    assert found["hits"][0]["paper"]["key"] == "2511.09001"
    assert any(piece["match"] for piece in found["hits"][0]["snippet"])
    assert "<mark>" not in json.dumps(found)


@pytest.mark.parametrize(
    "address", ["/api/papers", "/api/papers/2511.09001", "/api/search?q=sheep", "/api/evidence/pag"]
)
def test_what_has_not_changed_is_not_sent_again(app, address):
    client = visitor(app)
    tag = client.get(address).headers["etag"]
    again = client.get(address, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    with app.state.feed.database.write() as connection:
        connection.execute("UPDATE paper SET title = title || ' sheep!'")
    changed = client.get(address, headers={"If-None-Match": tag})
    assert changed.status_code == (304 if "evidence" in address else 200)


def test_addresses_that_are_none_are_null(tmp_path):
    app = create_app(Settings(database=tmp_path / "f", owner_token="x"), clock=lambda: NOW)
    with app.state.feed.database.write() as connection:
        from perturbed.feed.papers import Paper

        store.upsert(connection, Paper(title="T", source="hub", arxiv="2511.1", code_url="javascript:x"), NOW)
    assert visitor(app).get("/api/papers/2511.1").json()["code_url"] is None
