"""A fleet: endpoints that are audited every night, and what that may cost. Read from FLEET.toml."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from weighbridge.records import Endpoint, LogprobLevel, Record

Hour = Annotated[int, Field(ge=0, le=23)]
# An environment variable that may hold a webhook's address, which is a secret as a key is.
WEBHOOK_NAME = r"^[A-Z][A-Z0-9_]*_WEBHOOK_URL$"


def slug_of(name: str) -> str:
    """An endpoint's name as that of a folder or a page."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "endpoint"


class FleetEndpoint(Endpoint):
    """One endpoint of a fleet: as it is audited, when, and what a month of it may cost."""

    level: LogprobLevel = "L3"
    hours: tuple[Hour, Hour] | None = Field(
        default=None, description="from the first hour to the second one, UTC; may run past midnight"
    )
    max_cost_usd_per_month: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_requests_per_month: int | None = Field(default=None, ge=1)

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return slug_of(self.name)

    def as_endpoint(self, max_cost_usd: float | None) -> Endpoint:
        """What an audit needs to know of it, with what it may cost tonight."""
        known = {name: getattr(self, name) for name in Endpoint.model_fields if name != "schema_"}
        limits = self.limits.model_copy(update={"max_cost_usd": max_cost_usd})
        return Endpoint.model_validate(known | {"limits": limits})

    def is_open(self, now: datetime) -> bool:
        """Whether the endpoint may be asked at this hour."""
        if self.hours is None or self.hours[0] == self.hours[1]:
            return True
        start, end = self.hours
        hour = now.astimezone(UTC).hour
        return start <= hour < end if start < end else hour >= start or hour < end


class Fleet(Record):
    """Endpoints that are audited every night and judged together."""

    schema_: Literal["weighbridge/fleet/1"] = Field(default="weighbridge/fleet/1", alias="schema")
    name: str = Field(min_length=1, max_length=120)
    endpoint: list[FleetEndpoint] = Field(min_length=1, max_length=10_000)
    max_cost_usd_per_month: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_requests_per_month: int | None = Field(default=None, ge=1)
    concurrency: int = Field(
        default=256,
        ge=1,
        le=1000,
        description="how many endpoints are asked at once; a dead one takes a place until it is given up",
    )
    jitter_s: float = Field(default=60.0, ge=0, le=7200, allow_inf_nan=False)
    false_discovery_rate: float = Field(default=0.01, gt=0, lt=0.5)
    webhook_url_env: str | None = Field(default=None, pattern=WEBHOOK_NAME)

    model_config = Record.model_config | {"populate_by_name": True}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen: dict[str, str] = {}
        for endpoint in self.endpoint:
            if endpoint.slug in seen:
                raise ValueError(
                    f"the names {seen[endpoint.slug]!r} and {endpoint.name!r} would share a folder; name them apart"
                )
            seen[endpoint.slug] = endpoint.name
        return self


def night_of(moment: datetime) -> date:
    """The night that a moment belongs to: from noon to noon, UTC, called by the day on which it begins."""
    return (moment.astimezone(UTC) - timedelta(hours=12)).date()
