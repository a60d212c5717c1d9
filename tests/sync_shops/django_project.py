"""What Django's own rules for transactions make of our calls; each check runs in a child."""

from __future__ import annotations

import os
from uuid import uuid4

import pytest
from sheppy import BackendError

from sheppy_sql import sync

EMAILS = "emails"


def check(url: str) -> None:
    os.environ["DATABASE_URL"] = url
    from django.db import connection, connections, transaction
    from django.db.transaction import TransactionManagementError

    from examples.django_shop.shop import Order
    from examples.django_shop.tasks import send_voucher

    def pending() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM sheppy_tasks")
            return int(cursor.fetchone()[0])

    with connection.schema_editor() as editor:
        editor.create_model(Order)

    # Outside of atomic() a call is a transaction of its own, on either of Django's two objects.
    for one in (connection, connections["default"]):
        assert sync.enqueue(one, EMAILS, send_voucher(1))
        assert connection.get_autocommit()
        assert not connection.in_atomic_block
    assert pending() == 2

    # A waiting process is not in Django's transaction either.
    with pytest.raises(TimeoutError):
        sync.wait_for(connection, EMAILS, uuid4(), timeout=0.01)
    with transaction.atomic():
        sync.enqueue(connection, EMAILS, waited := send_voucher(2))
        with pytest.raises(BackendError, match="commit first"):
            sync.wait_for(connection, EMAILS, waited)
        transaction.set_rollback(True)
    assert pending() == 2

    # An error that the application swallows takes its block along, as one of Django's does.
    missing = sync.Settings(table_prefix="missing_")
    with transaction.atomic():
        Order.objects.create(total=1)
        with pytest.raises(BackendError, match="sheppy-sql db upgrade"):
            sync.enqueue(connection, EMAILS, send_voucher(3), settings=missing)
        with pytest.raises(TransactionManagementError):
            sync.enqueue(connection, EMAILS, send_voucher(3))
        with pytest.raises(TransactionManagementError):
            Order.objects.count()
    assert Order.objects.count() == 0

    # In a savepoint it takes no more than that.
    with transaction.atomic():
        Order.objects.create(total=1)
        with pytest.raises(BackendError), transaction.atomic():
            sync.enqueue(connection, EMAILS, send_voucher(3), settings=missing)
        assert sync.enqueue(connection, EMAILS, send_voucher(3))
    assert (Order.objects.count(), pending()) == (1, 3)

    # A durable block is refused nothing, and a lost connection is Django's to open again.
    connection.close()
    with transaction.atomic(durable=True):
        assert sync.enqueue(connection, EMAILS, send_voucher(4))
    assert pending() == 4
    connection.close()
