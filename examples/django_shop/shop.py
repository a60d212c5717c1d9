"""Settings, table and views: all of a project that fits into one file."""

from __future__ import annotations

import os

import django
from django.conf import settings
from django.db import connection, models, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from sheppy import Task
from sqlalchemy import make_url

from sheppy_sql import sync

from .tasks import send_receipt, send_voucher

url = make_url(os.environ["DATABASE_URL"])
engine = "sqlite3" if url.drivername == "sqlite" else "postgresql"
settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={
        "default": {
            "ENGINE": f"django.db.backends.{engine}",
            "NAME": url.database,
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.host or "",
            "PORT": url.port or "",
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    ROOT_URLCONF=__name__,
    USE_TZ=True,
)
django.setup()


class Order(models.Model):
    total = models.IntegerField()  # cents

    class Meta:
        app_label = "shop"
        db_table = "orders"


class NoVoucherError(Exception):
    """There are none for small orders."""


def store_order(total: int) -> tuple[Order, Task]:
    """An order, and the task that sends its receipt, which runs once both are committed."""
    with transaction.atomic():
        order = Order.objects.create(total=total)
        receipt = send_receipt(order.id, order.total)
        sync.enqueue(connection, "emails", receipt)
        try:
            # A savepoint: without a voucher the order is placed nevertheless.
            with transaction.atomic():
                sync.enqueue(connection, "emails", send_voucher(order.id))
                if order.total < 1000:
                    raise NoVoucherError
        except NoVoucherError:
            pass
        if order.total <= 0:
            # Leaving the outer block by an exception takes back the order and its task.
            raise ValueError("An order must cost something")
    return order, receipt


def place_order(request: HttpRequest) -> HttpResponse:
    try:
        order, receipt = store_order(int(request.POST["total"]))
    except ValueError as error:
        return JsonResponse({"error": str(error)}, status=400)
    return JsonResponse({"order": order.id, "receipt": str(receipt.id)}, status=201)


def receipt(request: HttpRequest, task_id: str) -> HttpResponse:
    """What the task has returned, once a worker has run it."""
    try:
        done = sync.wait_for(connection, "emails", task_id, timeout=20)
    except TimeoutError:
        return HttpResponse("Not yet", status=404)
    return HttpResponse(done.result if done else "")


urlpatterns = [
    path("orders", place_order),
    path("receipts/<task_id>", receipt),
]
