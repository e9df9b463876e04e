"""From exchanges to observations: flat typed facts, nothing judged, nothing fetched."""

from weighbridge.dialects import DIALECTS
from weighbridge.dialects.routes import observe_route
from weighbridge.records import Exchange, Observation, Plan


def observe(plan: Plan, exchanges: list[Exchange]) -> dict[str, Observation]:
    """The observation of each request that has come back: what the host says of itself, then the plan's order.

    An attempt that was under way when the audit was killed came back as nothing; it is an attempt all the same.
    """
    dialect = DIALECTS[plan.endpoint.dialect]
    attempts: dict[str, list[Exchange]] = {}
    for exchange in exchanges:
        attempts.setdefault(exchange.sent.request_id, []).append(exchange)
    route = {
        name: observe_route(name, attempts[name], plan.endpoint) for name in plan.route_requests if name in attempts
    }
    return route | {
        request.request_id: dialect.observe(request.probe.id, attempts[request.request_id])
        for request in plan.requests
        if request.request_id in attempts
    }
