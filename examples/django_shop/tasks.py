"""What the workers do. They need neither Django nor the shop."""

from __future__ import annotations

from sheppy import task


@task
async def send_receipt(order_id: int, total: int) -> str:
    return f"Receipt for order {order_id}: {total} cents"


@task
async def send_voucher(order_id: int) -> str:
    return f"Voucher for order {order_id}"
