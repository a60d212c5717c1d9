# A worker image. Put your tasks into it:
#     FROM sheppy-sql
#     COPY . /app
FROM python:3.13-slim AS build

WORKDIR /src
RUN python -m venv /opt/sheppy-sql
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY src src
RUN /opt/sheppy-sql/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/sheppy-sql/bin/pip install --no-cache-dir /wheels/*.whl

FROM python:3.13-slim

ENV PATH="/opt/sheppy-sql/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can verify runAsNonRoot.
RUN groupadd --gid 10001 sheppy && useradd --uid 10001 --gid sheppy --no-create-home sheppy
COPY --from=build /opt/sheppy-sql /opt/sheppy-sql

# The worker imports tasks from its working directory; `alembic upgrade head` finds its files here.
WORKDIR /app
COPY alembic.ini ./
COPY migrations migrations
USER 10001:10001

ENTRYPOINT ["sheppy-sql"]
CMD ["work"]
