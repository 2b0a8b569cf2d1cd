"""What stands in cost.xlsx beyond prices: cards, spend, an API, the saving, memory. Formulas as lines.py explains."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.levels import BOOTSTRAP_FROM
from harness.report.workbook.lines import (
    OF_A_MILLION,
    POINTS,
    PRICES,
    Line,
    Section,
    at_slo,
    at_stated,
    known,
    priced,
)


def sections(closed: bool, repeats: Sequence[int], unit: str) -> list[Section]:
    """The lines of Workings. `closed`: the load is users; `unit`: what it is counted in. `repeats`: the numbers of the
    server sessions, where there are several."""
    found = [Section("At the largest load inside the service level", at_slo(unit))]
    if closed:
        found += [Section(f"At the stated {point} load", at_stated(point)) for point in POINTS[1:]]
    return [
        *found,
        Section("Cards", _cards(closed)),
        Section("Spend", _spend()),
        Section("Against an API", _api()),
        Section("Saving against the baseline", _saving(repeats), others_only=True),
        Section("Memory", _memory()),
        Section("Memory freed against the baseline", _freed(), others_only=True),
    ]


def _cards(closed: bool) -> tuple[Line, ...]:
    users = (
        Line("usable_users", "Users a card may be given", "users", "rate",
             known("{slo_load}", "{slo_load}*(1-headroom)"), "safe load × (1 − headroom)"),
        Line("cards_by_users", "Cards that the users take", "cards", "rate",
             known("users {usable_users}", "users/{usable_users}")),
        Line("tenants", "Tenants a card holds", "tenants", "count",
             known("{usable_users}", "ROUNDDOWN(ROUND({usable_users}/users_per_tenant,9),0)"),
             "users a card may be given / users of a tenant, whole ones"),
    )  # fmt: skip
    by_users = "N({cards_by_users})," if closed else ""
    return (
        *(users if closed else ()),
        Line("peak", "Requests at the peak", "req/s", "rate",
             '=IF(ISNUMBER(peak_rps),peak_rps,IF(ISNUMBER(requests_per_day),requests_per_day/86400*peak_factor,""))',
             "given, else requests a day / 86,400 × peak factor"),
        Line("usable_rps", "Requests a card may be given", "req/s", "rate",
             known("{slo_req_s}", "{slo_req_s}*(1-headroom)"), "requests a second at the safe load × (1 − headroom)"),
        Line("cards_by_requests", "Cards that the requests take", "cards", "rate",
             known("{peak} {usable_rps}", "{peak}/{usable_rps}")),
        Line("cards_exact", "The larger of the two", "cards", "rate",
             '=IF(COUNT({cards_by_users},{cards_by_requests})>0,MAX({cards_by_users},{cards_by_requests}),"")'
             if closed else known("{cards_by_requests}", "{cards_by_requests}")),
        Line("bound_by", "Bound by", "", "word",
             known("{cards_exact}",
                   'IF(N({cards_by_users})={cards_exact},"users","requests")' if closed else '"requests"')),
        Line("cards_for_load", "Cards for the load", "cards", "count",
             known("{cards_exact}", "MAX(1,ROUNDUP(ROUND({cards_exact},9),0))"), "rounded up, at least one"),
        Line("cards", "Cards", "cards", "count", known("{cards_for_load}", "{cards_for_load}+failover"),
             "with failover"),
        *(Line(f"cards_{end}", title, "cards", "count",
               f'=IF(AND(ISNUMBER({{cards}}),MIN(N({{slo_tok_s}}),N({{slo_tok_s_{pace}}}))>0),MAX(1,ROUNDUP(ROUND('
               f'MAX({by_users}N({{cards_by_requests}})/({{slo_tok_s_{pace}}}/{{slo_tok_s}})),9),0))+failover,"")',
               "requests a second rise and fall with tok/s")
          for end, pace, title in (("lo", "hi", "low end of its 95 % interval"), ("hi", "lo", "high end"))),
        Line("used_peak", "Used at the peak", "share", "share",
             known("{cards}", "{cards_exact}*(1-headroom)/{cards}"), "of the safe load of all cards"),
        Line("used_lost", "Used at the peak with the failover cards lost", "share", "share",
             known("{cards}", "{cards_exact}*(1-headroom)/{cards_for_load}"), "at most 1 − headroom"),
        Line("used_mean", "Used over a mean day", "share", "share",
             known("requests_per_day {cards} {slo_req_s}", "requests_per_day/86400/({cards}*{slo_req_s})"),
             "requests a day / what the cards answer in a day at their safe load"),
    )  # fmt: skip


def _spend() -> tuple[Line, ...]:
    shared = ("Output tokens, all on them", "Input tokens", "Output tokens", "Blended")
    incoming, outgoing = "{slo_input_tokens}*requests_per_day", "{slo_output_tokens}*requests_per_day"
    effective = (
        known("requests_per_day {usd_per_day} {slo_output_tokens}", f"{{usd_per_day}}/({outgoing})*1000000"),
        known("{effective_only} {slo_input_tokens}",
              f"{{usd_per_day}}/({incoming}+output_weight*{outgoing})*1000000"),
        known("{effective_input}", "output_weight*{effective_input}"),
        known("{effective_only} {slo_input_tokens}", f"{{usd_per_day}}/({incoming}+{outgoing})*1000000"),
    )  # fmt: skip
    full = (
        priced("{full_hour}", "{slo_tok_s}", "{full_hour}/({slo_tok_s}*3600)*1000000"),
        known("{full_only} {slo_input_tok_s}",
              "{full_hour}/(({slo_input_tok_s}+output_weight*{slo_tok_s})*3600)*1000000"),
        known("{full_input}", "output_weight*{full_input}"),
        known("{full_only} {slo_input_tok_s}", "{full_hour}/(({slo_input_tok_s}+{slo_tok_s})*3600)*1000000"),
    )  # fmt: skip
    return (
        Line("spend_share", "Share of the hour under load", "share", "share",
             known("{slo_hour}", "IF(ISNUMBER({used_mean}),{used_mean},{slo_share})"),
             "of a mean day where the traffic is given, else the share of above"),
        Line("spend_hour", "An hour of a card", "USD/h", "price",
             known("{slo_hour}", "{slo_capital}+{slo_idle}+{spend_share}*{slo_under_load}")),
        Line("usd_per_day", "All cards, a day", "USD", "usd", known("{cards} {spend_hour}", "{cards}*24*{spend_hour}")),
        Line("usd_per_month", "All cards, a month", "USD", "usd", known("{usd_per_day}", "{usd_per_day}*365.25/12"),
             "365.25 / 12 days"),
        *(Line(f"effective_{price}", f"{title}, at this traffic", OF_A_MILLION, "price", formula,
               "a day's spend / a day's tokens: failover and idle hours are paid")
          for price, title, formula in zip(PRICES, shared, effective, strict=True)),
        Line("full_hour", "An hour wholly under load", "USD/h", "price",
             known("{slo_hour}", "{slo_capital}+{slo_idle}+{slo_under_load}")),
        *(Line(f"full_{price}", f"{title}, never idle", OF_A_MILLION, "price", formula,
               "what the price at this traffic comes down to at best")
          for price, title, formula in zip(PRICES, shared, full, strict=True)),
    )  # fmt: skip


def _api() -> tuple[Line, ...]:
    prices = "api_usd_per_1m_input api_usd_per_1m_output {slo_input_tokens} {slo_output_tokens} {slo_hour}"
    never = 'IF({api_left}<=0,"never",IF({%s_even}>{%s_most},"never","yes"))'
    return (
        Line("api_request", "A request at the API", "USD", "price",
             known(prices, "({slo_input_tokens}*api_usd_per_1m_input+{slo_output_tokens}*api_usd_per_1m_output)"
                   "/1000000"), "of the lengths that were measured"),
        Line("api_day", "The API, a day", "USD", "usd",
             known("{api_request} requests_per_day", "{api_request}*requests_per_day")),
        Line("api_month", "The API, a month", "USD", "usd", known("{api_day}", "{api_day}*365.25/12")),
        Line("card_most", "Requests that one card answers in a day", "requests", "count",
             known("{api_request} {slo_req_s}", "{slo_req_s}*86400"), "at its safe load, never idle"),
        Line("api_left", "What a request saves, its own electricity paid", "USD", "price",
             known("{api_request} {card_most}", "{api_request}-24*{slo_under_load}/{card_most}")),
        Line("card_even", "Break-even of one card, a day", "requests", "count",
             known("{api_left}", 'IF({api_left}>0,24*({slo_capital}+{slo_idle})/{api_left},"")'),
             "24 × (capital + idle) / what a request saves"),
        Line("card_even_share", "as a share of what it answers in a day", "share", "share",
             known("{card_even}", "{card_even}/{card_most}"), "above 100 % it is full before it has paid"),
        Line("card_pays", "One card can beat the API", "", "word", known("{api_left}", never.replace("%s", "card"))),
        Line("fleet_most", "Requests a day that the cards carry, peak and headroom kept", "requests", "count",
             known("{api_left} {cards_for_load} {usable_rps}", "{cards_for_load}*{usable_rps}*86400/"
                   "IF(COUNT(peak_rps,requests_per_day)=2,peak_rps*86400/requests_per_day,peak_factor)")),
        Line("fleet_even", "Break-even of all cards, a day", "requests", "count",
             known("{fleet_most} {card_even}", "{cards}*{card_even}")),
        Line("fleet_even_share", "as a share of what they carry", "share", "share",
             known("{fleet_even}", "{fleet_even}/{fleet_most}")),
        Line("fleet_pays", "These cards can beat the API", "", "word",
             known("{fleet_most}", never.replace("%s", "fleet"))),
    )  # fmt: skip


def _saving(repeats: Sequence[int]) -> tuple[Line, ...]:
    logs = [
        Line(f"log_{repeat}", f"ln of the ratio of tok/s, session {repeat}", "", "seconds",
             f'=IF(COUNT({{slo_row}},{{base_slo_row}})=2,IF(AND(N(INDEX({{all_repeat_{repeat}}},{{slo_row}}))>0,'
             f"N(INDEX({{base_all_repeat_{repeat}}},{{base_slo_row}}))>0),LN(INDEX({{all_repeat_{repeat}}},{{slo_row}})/"
             f'INDEX({{base_all_repeat_{repeat}}},{{base_slo_row}})),""),"")', "each at its own safe load")
        for repeat in repeats
    ]  # fmt: skip
    cells, ratio = ",".join(f"{{log_{repeat}}}" for repeat in repeats), _ratio(repeats)
    pairs = Line("pairs", "Server sessions paired", "", "any", f"=COUNT({cells})", "the same number in both precisions")
    return (
        *((*logs, pairs) if repeats else ()),
        Line("ratio", "tok/s, as a multiple of the baseline's", "ratio", "price", ratio[""],
             "of the sessions paired where there are two or more, else of the two levels"),
        Line("ratio_lo", "low end of its 95 % interval", "ratio", "price", ratio["_lo"],
             "sessions: t on logs, from 10 on resampled and not here; levels: both intervals combined on logs"),
        Line("ratio_hi", "high end", "ratio", "price", ratio["_hi"]),
        Line("alike", "Both pay for electricity, or neither", "", "word",
             '=IF(AND(rent_or_own="own",usd_per_kwh>0,ISNUMBER({slo_watts})<>ISNUMBER({base_slo_watts})),"no","yes")',
             "else only one had its power measured, and nothing is compared"),
        Line("hours", "USD of a busy hour, as a multiple of the baseline's", "ratio", "price",
             '=IF(AND(COUNT({slo_hour},{base_slo_hour})=2,{alike}="yes",N({base_slo_hour})>0),'
             '({slo_hour}/{slo_share})/({base_slo_hour}/{base_slo_share}),"")'),
        *(Line(f"saving{end}", title, "share", "share",
               known(f"{{hours}} {{ratio{end}}}", f"1-{{hours}}/{{ratio{end}}}"),
               "1 − ratio of the hours / ratio of tok/s; each at its own safe load, so inside one service level")
          for end, title in (("", "Cut in the price of 1M tokens"), ("_lo", "low end of its 95 % interval"),
                             ("_hi", "high end"))),
    )  # fmt: skip


def _ratio(repeats: Sequence[int]) -> dict[str, str]:
    """tok/s over the baseline's and the ends of its interval, as compare.throughput_ratio finds them."""
    six = ",".join(f"{{{of}slo_tok_s{end}}}" for of in ("", "base_") for end in ("", "_lo", "_hi"))
    down = "LN({slo_tok_s}/{slo_tok_s_lo})^2+LN({base_slo_tok_s_hi}/{base_slo_tok_s})^2"
    up = "LN({slo_tok_s_hi}/{slo_tok_s})^2+LN({base_slo_tok_s}/{base_slo_tok_s_lo})^2"
    levels = {
        "": 'IF(MIN(N({slo_tok_s}),N({base_slo_tok_s}))>0,{slo_tok_s}/{base_slo_tok_s},"")',
        "_lo": f'IF(COUNT({six})=6,IF(MIN({six})>0,{{ratio}}*EXP(-SQRT({down})),""),"")',
        "_hi": f'IF(COUNT({six})=6,IF(MIN({six})>0,{{ratio}}*EXP(SQRT({up})),""),"")',
    }
    if not repeats:
        return {end: f"={formula}" for end, formula in levels.items()}
    logs = ",".join(f"{{log_{repeat}}}" for repeat in repeats)
    half = f"TINV(0.05,{{pairs}}-1)*STDEV({logs})/SQRT({{pairs}})"
    sessions = {
        "": f"EXP(AVERAGE({logs}))",
        "_lo": f'IF({{pairs}}<{BOOTSTRAP_FROM},EXP(AVERAGE({logs})-{half}),"")',
        "_hi": f'IF({{pairs}}<{BOOTSTRAP_FROM},EXP(AVERAGE({logs})+{half}),"")',
    }
    return {end: f"=IF({{pairs}}>1,{sessions[end]},{levels[end]})" for end in levels}


def _memory() -> tuple[Line, ...]:
    medians = (("weights_gib", "Weights", "GiB"), ("kv_cache_gib", "KV cache", "GiB"), ("other_gib", "Other", "GiB"))
    whole = "2*ROUND(MEDIAN({raw_kv_cache_tokens})/2,0)"
    half = "MOD(MEDIAN({raw_kv_cache_tokens}),1)=0.5"
    return (
        *(Line(key, title, of, "gib", f'=IF(COUNT({{raw_{key}}})>0,MEDIAN({{raw_{key}}}),"")', "median of all rows")
          for key, title, of in medians),
        Line("kv_cache_tokens", "KV cache, tokens", "tokens", "count",
             f'=IF(COUNT({{raw_kv_cache_tokens}})>0,IF({half},{whole},ROUND(MEDIAN({{raw_kv_cache_tokens}}),0)),"")',
             "median of all rows, whole; of two neighbours the even one"),
        Line("memory_kind", "Memory of", "", "word",
             '=IF(COUNTIF({raw_memory_kind},"gpu")>0,"gpu",IF(COUNTIF({raw_memory_kind},"host")>0,"host",""))'),
    )  # fmt: skip


def _freed() -> tuple[Line, ...]:
    return (
        Line("freed_gib", "Weights", "GiB", "gib",
             known("{weights_gib} {base_weights_gib}", "{base_weights_gib}-{weights_gib}"), "negative: it takes more"),
        Line("freed_reported", "The engine filled the card with KV cache", "", "word",
             '=IF(AND({memory_kind}="gpu",{base_memory_kind}="gpu",OR(NOT(ISNUMBER({base_kv_cache_gib})),'
             '{kv_cache_gib}<>{base_kv_cache_gib}),COUNT({kv_cache_tokens},{base_kv_cache_tokens})=2),"yes","no")',
             "then the next figure is what it reported; else what the freed GiB would hold"),
        Line("freed_tokens", "More tokens in the KV cache", "tokens", "count",
             '=IF({freed_reported}="yes",{kv_cache_tokens}-{base_kv_cache_tokens},IF(AND(ISNUMBER({freed_gib}),'
             'MIN(N({kv_cache_gib}),N({kv_cache_tokens}))>0),TRUNC({freed_gib}/({kv_cache_gib}/{kv_cache_tokens})),""))'),
        Line("freed_users", "More users in memory", "users", "count",
             known("{freed_tokens}", "TRUNC({freed_tokens}/context_tokens)"),
             "of context_tokens each; the service level may allow fewer"),
    )  # fmt: skip
