"""Customers of the two shops, each in a process of its own: Django is set up once and for all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

Post = Callable[[dict[str, str]], tuple[int, Any]]
Get = Callable[[str], tuple[int, str]]


def buy(post: Post, get: Get) -> None:
    """Print the answers to a small order, a large one, and one that is refused."""
    placed = [post({"total": total}) for total in ("500", "2000", "-1")]
    receipts = [get(answer["receipt"]) for status, answer in placed if status == 201]
    print(json.dumps({"statuses": [status for status, _ in placed], "receipts": receipts}))


def in_django(url: str) -> None:
    os.environ["DATABASE_URL"] = url
    from django.db import connection
    from django.test import Client

    from examples.django_shop import shop

    with connection.schema_editor() as editor:
        editor.create_model(shop.Order)
    client = Client()

    def post(form: dict[str, str]) -> tuple[int, Any]:
        answer = client.post("/orders", form)
        return answer.status_code, answer.json()

    def get(task_id: str) -> tuple[int, str]:
        answer = client.get(f"/receipts/{task_id}")
        return answer.status_code, answer.content.decode()

    buy(post, get)
    connection.close()


def in_flask(url: str) -> None:
    from examples.flask_shop.shop import create_app

    client = create_app(url).test_client()

    def post(form: dict[str, str]) -> tuple[int, Any]:
        answer = client.post("/orders", data=form)
        return answer.status_code, answer.json

    def get(task_id: str) -> tuple[int, str]:
        answer = client.get(f"/receipts/{task_id}")
        return answer.status_code, answer.text

    buy(post, get)
