"""Times a request may ask for: ahead, finite, and said which one is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coppice.engine.request import Request, SamplingParams
from coppice.errors import RequestError


@pytest.mark.parametrize("field", ["deadline_s", "ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, -1e300, math.nan, math.inf, -math.inf])
def test_a_time_in_the_past_or_none_at_all_is_refused(field: str, value: float) -> None:
    times: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match=f"{field} must be more than 0 seconds") as caught:
        Request(id="r", prompt=[1], sampling=SamplingParams(), **times)
    assert caught.value.param == field
