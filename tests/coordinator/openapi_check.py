"""Does an answer fit the OpenAPI document? As much of JSON Schema as FastAPI writes for dataclasses."""

import re
from typing import Any

import httpx

from geni_violin.runtime.problems import MAPPINGS, PROBLEM_MEDIA_TYPE

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


class OpenApi:
    """An OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.checked = 0

    def check(self, method: str, path: str, response: httpx.Response) -> None:
        """Check one answer.

        :raise AssertionError: the request is not in the document, or the answer does not fit.
        """
        self.checked += 1
        operation = self._operation(method, path)
        if not response.is_success:
            _check_problem(response)
            return
        documented = operation["responses"].get(str(response.status_code))
        assert documented is not None, f"{method} {path} answers {response.status_code}, which is not documented"
        schema = documented.get("content", {}).get("application/json", {}).get("schema")
        if schema is not None and "text/event-stream" not in response.headers["content-type"]:
            self._validate(schema, response.json(), f"{method} {path}")

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        for template, operations in self._document["paths"].items():
            if re.fullmatch(re.sub(r"\{[a-z_]+\}", "[^/]+", template), path) and method.lower() in operations:
                found: dict[str, Any] = operations[method.lower()]
                return found
        raise AssertionError(f"{method} {path} is not in the OpenAPI document")

    def _validate(self, schema: dict[str, Any], value: Any, place: str) -> None:
        if "$ref" in schema:
            self._validate(self._document["components"]["schemas"][schema["$ref"].split("/")[-1]], value, place)
            return
        expected = _TYPES.get(schema.get("type", ""), object)
        assert isinstance(value, expected), f"{place}: {value!r} is not of type {schema.get('type')}"
        if isinstance(value, dict):
            self._validate_object(schema, value, place)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                self._validate(schema.get("items", {}), item, f"{place}[{number}]")

    def _validate_object(self, schema: dict[str, Any], value: dict[str, Any], place: str) -> None:
        missing = set(schema.get("required", ())) - value.keys()
        assert not missing, f"{place}: {missing} missing"
        properties = schema.get("properties")
        rest = schema.get("additionalProperties", True)
        for name, item in value.items():
            if properties is not None and name in properties:
                self._validate(properties[name], item, f"{place}.{name}")
            else:
                assert properties is None or rest is not True, f"{place}: {name} is not documented"
                self._validate(rest if isinstance(rest, dict) else {}, item, f"{place}.{name}")


def _check_problem(response: httpx.Response) -> None:
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE, response.text
    document = response.json()
    assert document.keys() == {"type", "title", "status", "detail", "hint"}
    assert document["status"] == response.status_code
    assert document["type"].rpartition(":")[2] in {mapping.slug for mapping in MAPPINGS.values()}
    assert document["detail"] and "\n" not in document["detail"]
