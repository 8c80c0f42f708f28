"""Every case that is compared with its library: one table, for the live tests and for recording."""

from tests.parity import (
    cases_convolution,
    cases_hybrids,
    cases_language,
    cases_timm_vit,
    cases_vision,
    cases_windows,
)
from tests.parity.case import Case

CASES: dict[str, Case] = {
    **cases_timm_vit.CASES,
    **cases_vision.CASES,
    **cases_convolution.CASES,
    **cases_hybrids.CASES,
    **cases_windows.CASES,
    **cases_language.CASES,
}
