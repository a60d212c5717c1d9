"""What the worker does."""

# Without `from __future__ import annotations`: sheppy checks the arguments of a task against their
# types, and does not find those that are only named.
from uuid import UUID

from sheppy import task

from .database import sessions
from .tables import Order, Receipt


@task(retry=3, retry_delay=1)
async def send_receipt(order_id: UUID) -> None:
    """Send the receipt of an order, unless it was sent: a task may run twice."""
    async with sessions.begin() as session:
        # Locked: of two runs at once, the second waits for the first, and finds its receipt.
        order = await session.get_one(Order, order_id, with_for_update=True)
        if await session.get(Receipt, order_id) is None:
            await send_email(order.email, f"Your order {order_id}: {order.total / 100:.2f}")
            session.add(Receipt(order_id=order_id))


async def send_email(address: str, text: str) -> None:
    """Stands for a mail service.

    If the worker dies right after it, the e-mail is sent again. Give the service the order's id as
    its idempotency key, if it takes one.
    """
