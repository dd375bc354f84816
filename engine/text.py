"""Text before the model: cleaning, checking, the caller's lexicon, normalisation, cutting into segments.

Owns what every request's text goes through before any tokenizer or phonemizer sees it; families call `speak`. It knows
no voice and no model, never touches torch, and never raises on odd characters: only `check_text` refuses a text. The
English rules are one table, `_RULES`, read top to bottom; each leaves words behind, so a later one sees no
trace of it. Chinese is written out by wetext (WeTextProcessing's rules), clause by clause.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType

from declaim.engine.errors import InvalidRequest, TooLong
from declaim.engine.lexicon import Lexicon
from declaim.engine.words import UNSPACED, Segment, TracedText

Match = re.Match[str]
Rule = tuple[re.Pattern[str], Callable[[Match], str]]

MAX_GROWTH = 20  # characters said for one written, at most: a lexicon must not make a book of a line
MAX_NUMBER_DIGITS = 15  # longer digit strings are identifiers, not amounts: read digit by digit

# Line and separator controls are spaces; other controls, lone surrogates, soft hyphens, zero-width and
# bidirectional marks, byte-order marks, tags and non-characters say nothing.
_SILENT = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSPACED_RUN = re.compile(r"\S+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_KANA = re.compile("[\u3040-\u30ff]")
# With a digit or a sign in it; the rest of Chinese is said as it is written, and the rules take their time.
_CHINESE_CLAUSE = re.compile(r"[^，。！？；、\n]*[0-9０-９%％$￥¥€£℃°~～+=][^，。！？；、\n]*")


def clean_text(text: str) -> str:
    """Composed (NFC) text without control, invisible or broken characters, single-spaced. Idempotent."""
    return _cleaned(TracedText.of(text)).text


def _cleaned(text: TracedText) -> TracedText:
    text = text.sub(_SILENT, lambda _: "")
    return text.sub(_UNSPACED_RUN, lambda m: unicodedata.normalize("NFC", m.group())).single_spaced()


def is_speakable(text: str) -> bool:
    """Whether there is at least one letter or digit, of any script."""
    return any(character.isalnum() for character in text)


def check_text(text: str, *, max_chars: int) -> None:
    """Refuse what cannot be spoken.

    Raises: InvalidRequest (param "text") when nothing in it can be said, TooLong above `max_chars`.
    """
    if not text.strip():
        raise InvalidRequest("text is empty: send at least one word", param="text")
    if len(text) > max_chars:
        raise TooLong(
            f"text has {len(text)} characters, the limit is {max_chars}: send it in several requests",
            param="text",
        )
    if not is_speakable(text):
        shown = text if len(text) <= 20 else text[:20] + "…"
        raise InvalidRequest(f"text {shown!r} has no letter and no digit: send at least one word", param="text")


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a request wants its text read.

    language: an ISO 639-1 code or a tag; None leaves it to the family. normalize: whether numbers and the like are
    written out.
    """

    language: str | None = None
    normalize: bool = True
    lexicon: Lexicon = field(default_factory=Lexicon)


def speak(
    text: str, options: TextOptions, *, language: str | None, max_chars: int, max_segment_chars: int | None
) -> list[Segment]:
    """A caller's text as segments that a model can say, each with the caller's words that it says.

    language: whose rules write out numbers, dates, money, units and addresses: "en" or "zh"; others, and None, leave
    the text to the model. max_chars: the longest text taken, once cleaned. max_segment_chars: None keeps it whole.
    Raises: InvalidRequest, TooLong.
    """
    cleaned = _cleaned(TracedText.of(text))
    check_text(cleaned.text, max_chars=max_chars)
    said = options.lexicon.apply(cleaned).single_spaced()
    if options.normalize:
        said = _normalized(said, language)
    check_text(said.text, max_chars=MAX_GROWTH * max_chars)
    pieces = [said.text] if max_segment_chars is None else segment(said.text, max_chars=max_segment_chars)
    return said.segments(pieces, text)


def guess_language(text: str) -> str:
    """The language whose rules write a text out: "zh" for Han characters without kana, else "en"."""
    return "zh" if _HAN.search(text) and not _KANA.search(text) else "en"


def _normalized(text: TracedText, language: str | None) -> TracedText:
    match language:
        case "en":
            return _in_english(text)
        case "zh":
            return text.sub(_CHINESE_CLAUSE, _in_chinese).single_spaced()
        case _:
            return text


def _in_chinese(match: Match) -> str:
    """A clause with its numbers, dates, money and units in Chinese. Raises: InvalidRequest without wetext."""
    try:
        from wetext import Normalizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise InvalidRequest(
            "numbers in Chinese text need the package wetext, which is not installed: write them out, or send"
            " normalize: false",
            param="normalize",
        ) from error
    return str(Normalizer(lang="zh", operator="tn").normalize(match.group()))


# Numbers in words.


def _cardinal(number: int) -> str:
    from num2words import num2words

    words: str = num2words(number)
    return words.replace(",", "").replace(" and ", " ")


def _ordinal(number: int) -> str:
    from num2words import num2words

    words: str = num2words(number, to="ordinal")
    return words.replace(",", "").replace(" and ", " ")


def _digits(text: str) -> str:
    return " ".join(_cardinal(int(digit)) for digit in text if digit.isdigit())


def _whole(text: str) -> str:
    """An unsigned integer, thousands separators allowed; long or zero-padded ones digit by digit."""
    digits = text.replace(",", "")
    if len(digits) > MAX_NUMBER_DIGITS or (len(digits) > 1 and digits[0] == "0"):
        return _digits(digits)
    return _cardinal(int(digits))


def _number(text: str) -> str:
    """An integer or decimal, signed or not."""
    sign, unsigned = ("minus ", text[1:]) if text[0] in "-+" else ("", text)
    if text[0] == "+":
        sign = "plus "
    whole, point, fraction = unsigned.partition(".")
    words = _whole(whole) if whole else "zero"
    return f"{sign}{words} point {_digits(fraction)}" if point and fraction else sign + words


def _year(year: int) -> str:
    century, rest = divmod(year, 100)
    if not 1100 <= year <= 2999 or century % 10 == 0 and rest < 10:
        return _cardinal(year)
    if rest == 0:
        return f"{_cardinal(century)} hundred"
    return f"{_cardinal(century)} {'oh ' if rest < 10 else ''}{_cardinal(rest)}"


def _plural(words: str) -> str:
    if words.endswith("y"):
        return words[:-1] + "ies"
    return words + ("es" if words.endswith(("x", "s", "ch")) else "s")


# A number as written: 1,234,567.89 or 12 or .5
_NUM = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"

# Web addresses and file names.

_SPOKEN_IN_ADDRESS = MappingProxyType(
    {
        ".": "dot", "/": "slash", "-": "dash", "_": "underscore", "@": "at", "?": "question mark",
        "=": "equals",
        "&": "and", "#": "hash", ":": "colon", "+": "plus", "%": "percent", "~": "tilde",
    }
)  # fmt: skip
_DOMAINS = "com|org|net|edu|gov|mil|int|io|ai|dev|app|co|uk|de|fr|eu|info|biz|tv|ly|gg|ch|nl|jp|ca"
_EXTENSIONS = (
    "py|js|ts|json|txt|md|csv|html|css|pdf|wav|mp3|mp4|zip|png|jpg|jpeg|gif|yaml|yml|toml|cpp|exe|sh|docx?|xlsx?"
)


def _address(match: Match) -> str:
    text = re.sub(r"^[a-z]+://", "", match.group(0), flags=re.IGNORECASE).rstrip("/")
    words = []
    for part in re.findall(r"[A-Za-z]+|\d+|[^A-Za-z\d\s]", text):
        if part.isascii() and part.isdigit():
            words.append(_whole(part))
        elif part.lower() == "www":
            words.append("W W W")
        else:
            words.append(_SPOKEN_IN_ADDRESS.get(part, part if part.isalpha() else ""))
    return " " + " ".join(word for word in words if word) + " "


# Dates and times.

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November",     "December",
)  # fmt: skip
_MONTH = (
    r"(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DAY = r"(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"


def _month_name(text: str) -> str:
    return next(month for month in _MONTHS if month.startswith(text[:3].capitalize()))


def _date(year: str | None, month: int, day: int) -> str:
    spoken = f"{_MONTHS[month - 1]} {_ordinal(day)}"
    return f"{spoken}, {_year(int(year))}" if year else spoken


def _iso_date(match: Match) -> str:
    return _date(match.group(1), int(match.group(2)), int(match.group(3)))


def _slashed_date(match: Match) -> str:
    first, second, year = int(match.group(1)), int(match.group(2)), match.group(3)
    # American order, unless only the other one can be a date.
    month, day = (second, first) if first > 12 >= second else (first, second)
    if month > 12:
        return " ".join(_cardinal(number) for number in (first, second, int(year)))
    return _date(year if len(year) == 4 else f"20{year}", month, day)


def _month_day(match: Match) -> str:
    year = match.group(3)
    return _date(year, _MONTHS.index(_month_name(match.group(1))) + 1, int(match.group(2)))


def _day_month(match: Match) -> str:
    month = _month_name(match.group(2))
    year = f", {_year(int(match.group(3)))}" if match.group(3) else ""
    return f"the {_ordinal(int(match.group(1)))} of {month}{year}"


def _month_year(match: Match) -> str:
    return f"{_month_name(match.group(1))} {_year(int(match.group(2)))}"


def _half_of_day(text: str | None) -> str:
    return f" {text[0].upper()} M" if text else ""


def _time(match: Match) -> str:
    hour, minute, second, half = int(match.group(1)), match.group(2), match.group(3), match.group(4)
    if minute == "00":
        minutes = "" if half or second else (" hundred" if hour > 12 else " o'clock")
        spoken = ("zero" if hour == 0 else _cardinal(hour)) + minutes
    else:
        spoken = f"{_cardinal(hour)} {'oh ' if minute[0] == '0' else ''}{_cardinal(int(minute))}"
    if second:
        unit = "second" if int(second) == 1 else "seconds"
        spoken += f" and {_cardinal(int(second))} {unit}"
    return spoken + _half_of_day(half)


def _hour(match: Match) -> str:
    return _cardinal(int(match.group(1))) + _half_of_day(match.group(2))


# Money, percentages, units.

_CURRENCIES = MappingProxyType(
    {
        "$": ("dollar", "dollars", "cent", "cents"),
        "£": ("pound", "pounds", "penny", "pence"),
        "€": ("euro", "euros", "cent", "cents"),
        "¥": ("yen", "yen", "sen", "sen"),
        "₹": ("rupee", "rupees", "paisa", "paise"),
    }
)
_MAGNITUDES = MappingProxyType(
    {
        "k": "thousand", "m": "million", "mm": "million", "mn": "million", "b": "billion", "bn": "billion",
        "t": "trillion", "tn": "trillion", "thousand": "thousand", "million": "million", "billion": "billion",
        "trillion": "trillion", "hundred": "hundred",
    }
)  # fmt: skip
_MAGNITUDE = r"(?:\s?(hundred|thousand|million|billion|trillion)\b|(bn|tn|mn|mm|[kmbt])\b)?"


def _money(match: Match) -> str:
    sign, symbol, amount = match.group(1), match.group(2), match.group(3)
    magnitude = match.group(4) or match.group(5)
    one, many, one_part, many_parts = _CURRENCIES[symbol]
    prefix = "minus " if sign else ""
    if magnitude:
        return f"{prefix}{_number(amount)} {_MAGNITUDES[magnitude.lower()]} {many}"
    whole, _, part = amount.partition(".")
    if part and len(part) != 2:
        return f"{prefix}{_number(amount)} {many}"
    spoken = []
    if whole.strip("0,") or not part.strip("0"):
        spoken.append(f"{_whole(whole)} {one if whole == '1' else many}")
    if part.strip("0"):
        spoken.append(f"{_cardinal(int(part))} {one_part if part == '01' else many_parts}")
    return prefix + " and ".join(spoken)


def _money_range(match: Match) -> str:
    magnitude = match.group(4) or match.group(5)
    size = f" {_MAGNITUDES[magnitude.lower()]}" if magnitude else ""
    return f"{_number(match.group(2))} to {_number(match.group(3))}{size} {_CURRENCIES[match.group(1)][1]}"


def _percent(match: Match) -> str:
    other = f" to {_number(match.group(2))}" if match.group(2) else ""
    return f"{_number(match.group(1))}{other} percent"


_UNITS = MappingProxyType(
    {
        "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "µm": "micrometer",
        "μm": "micrometer", "nm": "nanometer", "mi": "mile", "ft": "foot", "in.": "inch", "yd": "yard",
        "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound", "lbs": "pound", "oz": "ounce",
        "l": "liter", "L": "liter", "ml": "milliliter", "mL": "milliliter", "gal": "gallon",
        "s": "second", "sec": "second", "ms": "millisecond", "µs": "microsecond", "μs": "microsecond",
        "ns": "nanosecond", "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
        "B": "byte", "KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
        "PB": "petabyte", "KiB": "kibibyte", "MiB": "mebibyte", "GiB": "gibibyte", "TiB": "tebibyte",
        "bit": "bit", "kbit": "kilobit", "Mbit": "megabit", "Gbit": "gigabit",
        "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz",
        "V": "volt", "mV": "millivolt", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "GW": "gigawatt",
        "kWh": "kilowatt hour", "A": "amp", "mA": "milliamp", "mAh": "milliamp hour", "J": "joule",
        "kJ": "kilojoule",
        "cal": "calorie", "kcal": "kilocalorie", "N": "newton", "Pa": "pascal", "kPa": "kilopascal",
        "dB": "decibel",
        "px": "pixel", "ha": "hectare", "°": "degree", "°C": "degree Celsius",
        "°F": "degree Fahrenheit", "ºC": "degree Celsius", "ºF": "degree Fahrenheit",
        "mph": "mile per hour", "km/h": "kilometer per hour", "kph": "kilometer per hour",
        "kmh": "kilometer per hour", "m/s": "meter per second", "mpg": "mile per gallon",
        "rpm": "revolution per minute",
        "fps": "frame per second", "bpm": "beat per minute", "dpi": "dot per inch",
        "Mbps": "megabit per second",
        "Gbps": "gigabit per second", "kbps": "kilobit per second", "MB/s": "megabyte per second",
        "GB/s": "gigabyte per second",
        "m2": "square meter", "m²": "square meter", "km2": "square kilometer", "km²": "square kilometer",
        "cm2": "square centimeter", "cm²": "square centimeter", "m3": "cubic meter", "m³": "cubic meter",
        "cm3": "cubic centimeter", "cm³": "cubic centimeter", "sq ft": "square foot", "sqft": "square foot",
    }
)  # fmt: skip
# One letter glued or spaced is often no unit ("plan 5 A", "3 B"): these need the number glued to them.
_GLUED_UNITS = frozenset({"m", "g", "l", "L", "s", "h", "B", "V", "W", "A", "J", "N"})
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))


def _unit(match: Match) -> str:
    first, second, gap, unit = match.group(1), match.group(2), match.group(3), match.group(4)
    if gap.isspace() and unit in _GLUED_UNITS and unit not in ("m", "g", "s"):
        return f"{_quantity(first, second)}{gap}{unit}"
    return f"{_quantity(first, second)} {_unit_words(unit, one=first == '1' and not second)}"


def _quantity(first: str, second: str | None) -> str:
    return f"{_number(first)} to {_number(second)}" if second else _number(first)


def _unit_words(unit: str, *, one: bool) -> str:
    words = _UNITS[unit]
    if one:
        return words
    head, per, rest = words.partition(" per ")
    first, _, after = head.partition(" ")
    if first == "degree":
        return f"degrees {after}".strip()
    if head.endswith("foot"):
        head = head[:-4] + "feet"
    elif not head.endswith(("hertz", "kelvin")):
        head = _plural(head)
    return head + per + rest


# Other numbers.

_YEAR_CUE = (
    r"\b(in|since|by|from|until|till|during|year|before|after|around|circa|of|early|late|mid|spring|summer"
    r"|fall|autumn|winter)"
)
_FRACTIONS = MappingProxyType({2: ("half", "halves"), 4: ("quarter", "quarters")})


def _phone(match: Match) -> str:
    groups = re.findall(r"\+?\d+", match.group(0))
    spoken = [("plus " if group[0] == "+" else "") + _digits(group) for group in groups]
    return ", ".join(spoken)


def _ordinal_rule(match: Match) -> str:
    digits = match.group(1).replace(",", "")
    return _ordinal(int(digits)) if len(digits) <= MAX_NUMBER_DIGITS else f"{_digits(digits)}th"


def _decade(match: Match) -> str:
    century, decade = match.group(1), int(match.group(2))
    tens = "hundreds" if decade == 0 else _plural(_cardinal(decade))
    if not century:
        return tens
    if decade == 0 and century == "20":
        return "two thousands"
    return f"{_cardinal(int(century))} {tens}"


def _year_range(match: Match) -> str:
    first, second = match.group(1), match.group(2)
    end = _cardinal(int(second)) if len(second) == 2 else _year(int(second))
    return f"{_year(int(first))} to {end}"


def _range(match: Match) -> str:
    return f"{_number(match.group(1))} to {_number(match.group(2))}"


def _fraction(match: Match) -> str:
    whole, top, bottom = match.group(1), int(match.group(2)), int(match.group(3))
    if (top, bottom) == (24, 7):
        return "twenty-four seven"
    if top == bottom and not whole:
        return f"{_cardinal(top)} {_cardinal(top)}"
    if bottom < 2 or bottom > 100 or top >= bottom:
        return f"{_cardinal(top)} over {_cardinal(bottom)}"
    one, many = _FRACTIONS.get(bottom, (_ordinal(bottom), _ordinal(bottom) + "s"))
    spoken = f"{_cardinal(top)} {one if top == 1 else many}"
    if whole:
        return f"{_cardinal(int(whole))} and {'a ' + one if top == 1 else spoken}"
    return spoken


def _version(match: Match) -> str:
    return " point ".join(_whole(part) for part in match.group(0).split("."))


def _cued_year(match: Match) -> str:
    return f"{match.group(1)}{match.group(2)}{_year(int(match.group(3)))}"


def _power(match: Match) -> str:
    return {"²": " squared", "³": " cubed"}[match.group(0)]


# Abbreviations.

_TITLES = MappingProxyType(
    {
        "Dr": "Doctor", "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Prof": "Professor", "St": "Saint",
        "Gen": "General", "Col": "Colonel", "Capt": "Captain", "Sgt": "Sergeant", "Lt": "Lieutenant",
        "Rev": "Reverend", "Gov": "Governor", "Sen": "Senator", "Rep": "Representative", "Hon": "Honorable",
        "Mt": "Mount", "Ft": "Fort", "Pres": "President",
    }
)  # fmt: skip
_ANYWHERE = MappingProxyType(
    {
        "etc": "et cetera", "vs": "versus", "approx": "approximately", "dept": "department",
        "est": "established",
        "jr": "junior", "sr": "senior", "inc": "incorporated", "ltd": "limited", "corp": "corporation",
        "ave": "avenue", "blvd": "boulevard", "rd": "road", "st": "street", "dr": "drive", "tel": "telephone",
        "govt": "government", "assn": "association", "misc": "miscellaneous", "incl": "including", "al": "al",
        "ca": "circa", "cf": "compare", "bros": "brothers", "mt": "mount", "univ": "university",
        "co": "company",
    }
)  # fmt: skip
_MAY_END = frozenset("etc jr sr inc ltd corp co bros ave blvd rd st dr al".split())
_BEFORE_NUMBER = MappingProxyType(
    {
        "no": "number", "nos": "numbers", "vol": "volume", "fig": "figure", "figs": "figures",
        "ch": "chapter",
        "sec": "section", "pp": "pages", "p": "page", "eq": "equation", "ver": "version", "v": "version",
        "art": "article", "ex": "example",
    }
)  # fmt: skip
_WEEKDAYS = MappingProxyType(
    {
        "Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday",
        "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday",
    }
)  # fmt: skip


def _title(match: Match) -> str:
    return f"{_TITLES[match.group(1)]} "


def _street(match: Match) -> str:
    after = match.string[match.end() :].lstrip("\"') ").split(" ", 1)[0]
    # "Elm St. is", "Elm St. The", but "Visit St. Paul".
    if after[:1].isupper() and after not in _SENTENCE_STARTERS:
        return match.group(0)
    return f"{match.group(1)}Street" + ("" if after and after[0].islower() else ".")


def _spelt_glued(match: Match) -> str:
    return " ".join(match.group(0).upper()) + " "


def _ratio(match: Match) -> str:
    return f"{_whole(match.group(1))} to {_whole(match.group(2))}"


def _feet_and_inches(match: Match) -> str:
    feet, inches = int(match.group(1)), int(match.group(2))
    return f"{_cardinal(feet)} {'foot' if feet == 1 else 'feet'} {_cardinal(inches)}"


def _scientific(match: Match) -> str:
    return f"{_number(match.group(1))} times ten to the {_number(match.group(2))}"


def _anywhere(match: Match) -> str:
    abbreviation = match.group(1).lower()
    words = _ANYWHERE[abbreviation]
    if match.group(1)[0].isupper():
        words = words.capitalize()
    # The full stop also ended the sentence when a new one, or nothing, follows.
    after = match.string[match.end() :].lstrip("\"') ")[:1]
    ends = not after or (after.isupper() and abbreviation in _MAY_END)
    return words + ("." if ends else "")


def _initials(match: Match) -> str:
    letters = " ".join(match.group(0).replace(".", "").upper())
    after = match.string[match.end() :].lstrip("\"') ")
    ends = not after or after.split(" ", 1)[0] in _SENTENCE_STARTERS
    return letters + ("." if ends else "")


# Initialisms that have a vowel, and would pass for a word; those without one are spelt anyway.
_SPELT = frozenset(
    "USB CPU GPU TPU API URL URI UI UX AI ID IP IDE ISP USA UK EU UN UAE FBI CIA IRS NBA NFL AWS SDK SEO "
    "CEO CFO CTO "
    "COO HR PR VIP ATM BBC ABC CBS CNN ESPN ETA FAQ FYI DIY DNA RNA EEG EKG ECG MRI ICU HIV IQ IPO IOS OS "
    "OCR OEM "
    "PPI APR SUV UFO UV VPN XML YML ASR TTS EOS BOS EOF IO GPIO UTC EST AKA AC DC FM BC MIT UCLA UPS UPC "
    "IBM GUI CLI "
    "NYU UDP IEEE ISO ALU FPGA AAA IOU IUD USD EUR AUD SSID".split()
)
_NOT_SPELT = frozenset({"HMM", "SHH", "BRR", "PSST", "NTH", "MR", "MRS", "DR", "ST", "VS", "MS", "PHD", "ZZZ", "GRR"})


def _acronym(match: Match) -> str:
    word, plural = match.group(1), match.group(2)
    if word in _NOT_SPELT or len(set(word)) == 1 and len(word) > 3:
        return match.group(0)
    # "US" is the country unless everything is in capitals.
    country = word == "US" and not match.string.isupper()
    if country or word in _SPELT or not set(word) & set("AEIOUY"):
        return " ".join(word) + ("'s" if plural else "")
    return match.group(0)


_ROMAN = MappingProxyType(
    {
        "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11,
        "XII": 12, "XIII": 13, "XIV": 14, "XV": 15, "XVI": 16, "XVII": 17, "XVIII": 18, "XIX": 19, "XX": 20,
        "XXI": 21, "XXII": 22, "XXIII": 23,
    }
)  # fmt: skip
_NUMBERED = (
    "War|Chapter|Part|Act|Scene|Volume|Phase|Type|Section|Book|Title|Level|Stage|Class|Article|Appendix|Mark"
    "|Bowl|Episode|Rocky|Schedule"
)
_REGAL = (
    "Henry|Elizabeth|Louis|George|Charles|Edward|William|James|Paul|John|Richard|Philip|Napoleon|Catherine|Alexander"
    "|Nicholas|Ivan|Leo|Pius|Benedict|Gregory|Frederick|Ferdinand|Mary|Ramses|Ptolemy|Wilhelm|Innocent|Urban|Clement"
)


def _roman_cardinal(match: Match) -> str:
    return f"{match.group(1)} {_cardinal(_ROMAN[match.group(2)])}"


def _roman_ordinal(match: Match) -> str:
    return f"{match.group(1)} the {_ordinal(_ROMAN[match.group(2)])}"


# Symbols.

_SYMBOLS = MappingProxyType(
    {
        "&": " and ", "@": " at ", "#": " hash ", "+": " plus ", "=": " equals ", "<": " less than ",
        ">": " greater than ", "±": " plus or minus ", "×": " times ", "÷": " divided by ", "/": " slash ",
        "\\": " backslash ", "%": " percent ", "°": " degrees ", "§": " section ", "$": " dollars ",
        "€": " euros ",
        "£": " pounds ", "¥": " yen ", "₹": " rupees ", "≈": " about ", "≤": " at most ", "≥": " at least ",
        "≠": " is not ", "→": " to ", "∞": " infinity ", "√": " root of ", "µ": " micro ", "π": " pi ",
        "*": " ", "_": " ", "~": " ", "^": " ", "`": " ", "|": ", ", "•": ", ", "·": " ",
        "(": ", ", "[": ", ", "{": ", ", ")": ", ", "]": ", ", "}": ", ",
    }
)  # fmt: skip


def _symbol(match: Match) -> str:
    return _SYMBOLS[match.group(0)]


def _constant(words: str) -> Callable[[Match], str]:
    return lambda match: words


def _group(template: str) -> Callable[[Match], str]:
    return lambda match: match.expand(template)


def _compile(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    return re.compile(pattern, flags | re.ASCII)


_I = re.IGNORECASE
_NOT_LETTER = r"(?<![A-Za-z])"
_RULES: tuple[Rule, ...] = (
    # Addresses first: everything inside them would look like something else.
    (_compile(r"\b[\w.+-]{1,64}@[A-Za-z\d-]{1,63}(?:\.[A-Za-z\d-]{1,63})+\b"), _address),
    (_compile(r"\bhttps?://[^\s<>\"]*[^\s<>\".,;:!?)\]}']", _I), _address),
    (
        _compile(
            rf"(?<![\w@.-])(?:[a-z\d-]{{1,63}}\.){{1,5}}(?:{_DOMAINS})\b(?!\.\w)(?:/[^\s<>\"]*[^\s<>\".,;:!?)\]}}'])?"
        ),
        _address,
    ),
    (_compile(rf"(?<![\w.])[\w-]{{1,64}}\.(?:{_EXTENSIONS})\b(?!\.\w)"), _address),
    # Dates and times.
    (_compile(r"(?<![\d.-])(\d{4})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?![\d-])"), _iso_date),
    (
        _compile(r"(?<![\d/.])(0?[1-9]|[12]\d|3[01])/(0?[1-9]|[12]\d|3[01])/(\d{4}|\d{2})(?![\d/])"),
        _slashed_date,
    ),
    (_compile(rf"\b{_MONTH}\s{_DAY}(?!\d|[.,:]\d)(?:,?\s(1[0-9]\d\d|20\d\d)(?![\d%]))?"), _month_day),
    (
        _compile(rf"(?:\bthe\s)?(?<![\d.,:]){_DAY}\s(?:of\s)?{_MONTH}(?:,?\s(1[0-9]\d\d|20\d\d)(?![\d%]))?(?!\w)"),
        _day_month,
    ),
    (_compile(rf"\b{_MONTH},?\s(1[0-9]\d\d|20\d\d)(?![\d%,])"), _month_year),
    (
        _compile(r"(?<![\d:.])([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?:\s?([ap])\.?\s?m\b\.?)?(?![\d:])", _I),
        _time,
    ),
    (_compile(r"(?<![\d:.,])(0?[1-9]|1[0-2])\s?([ap])\.?m\b\.?", _I), _hour),
    # Money, percentages, telephone numbers, units.
    (_compile(rf"([$£€¥₹])\s?({_NUM})\s?[-–—]\s?[$£€¥₹]?({_NUM}){_MAGNITUDE}", _I), _money_range),
    (_compile(rf"([-−](?=[$£€¥₹]))?([$£€¥₹])\s?({_NUM}){_MAGNITUDE}", _I), _money),
    (_compile(rf"(?<![\w.,])([-+]?{_NUM})(?:\s?[-–—]\s?({_NUM}))?\s?%"), _percent),
    (
        _compile(r"(?<![\w.-])(?:\+\d{1,3}[\s.-]?|1[\s.-])?(?:\(\d{3}\)\s?|\d{3}[.-])?\d{3}[.-]\d{4}(?![\w-]|\.\d)"),
        _phone,
    ),
    (_compile(r"(?<!\w)\+\d{1,3}(?:[\s.-]?\d{2,4}){2,5}(?!\w)"), _phone),
    (_compile(r"(?<![\w.,])'?(1[1-9]|20)?(\d0)'?s\b"), _decade),
    (_compile(r"(?<![\w.,])(\d)'\s?(\d\d?)(?:\"|'')"), _feet_and_inches),
    (_compile(rf"(?<![\w.,])([-+]?{_NUM})(?:\s?[-–—]\s?({_NUM}))?(\s?|-)({_UNIT})(?![\w°²³]|/\w)"), _unit),
    (re.compile("[²³]"), _power),
    # Numbers of a special shape.
    (
        _compile(rf"\b({'|'.join(_BEFORE_NUMBER)})\.\s?(?=\d)", _I),
        lambda m: _BEFORE_NUMBER[m.group(1).lower()] + " ",
    ),
    (_compile(r"\bv(?=\d)"), _constant("version ")),
    (_compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", _I), _ordinal_rule),
    (
        _compile(r"(?<![\w.,$-])(1[1-9]\d\d|20\d\d)\s?[-–—]\s?(1[1-9]\d\d|20\d\d|\d\d)(?![\w-]|[.,]\d)"),
        _year_range,
    ),
    (_compile(rf"(?<![\w.,-])({_NUM})\s?[-–—]\s?({_NUM})(?![\w-]|[.,]\d)"), _range),
    (_compile(r"(?<![\w./,])(?:(\d{1,3})\s)?(\d{1,2})\s?[/⁄]\s?(\d{1,3})(?![\w/]|\.\d)"), _fraction),
    (_compile(r"(?<![\w.,])\d{1,5}(?:\.\d{1,5}){2,6}(?![\w]|\.\d)"), _version),
    (_compile(rf"{_YEAR_CUE}(\s)(1[1-9]\d\d|20\d\d)(?![\w%]|[.,]\d)", _I), _cued_year),
    # 1900 to 2099 alone is a year unless a plural follows: "2050 people" is rare, "2050 items" is not a year.
    (_compile(r"(?<![\w.,$#+-])()()(19\d\d|20\d\d)(?![\w%]|[.,]\d|-\d|\s[a-z]+s\b)"), _cued_year),
    (_compile(r"(?<![\w.,:])(\d{1,4}):(\d{1,4})(?![\w:]|\.\d)"), _ratio),
    (_compile(rf"(?<![\w.,])({_NUM})e([-+]?\d{{1,3}})(?!\w)", _I), _scientific),
    # Abbreviations.
    (_compile(r"\bPh\.?\s?D\b\.?"), _constant("P H D")),
    (_compile(r"\be\.\s?g\b\.?,?"), _constant("for example,")),
    (_compile(r"\bi\.\s?e\b\.?,?"), _constant("that is,")),
    (_compile(r"\ba\.k\.a\b\.?"), _constant("also known as")),
    (_compile(r"\bw/o\b"), _constant("without")),
    (_compile(r"\bw/(?=\s|\w)"), _constant("with ")),
    (_compile(r"(\b[A-Z][a-z]+\s)St\.(?=\s|$)"), _street),
    (_compile(r"\b(Dr|Mr|Mrs|Ms|Prof|St|Mt|Ft)(\s)(?=[A-Z][a-z'])"), _title),
    (_compile(rf"\b({'|'.join(_TITLES)})\.(\s?)(?=[A-Z])"), _title),
    (_compile(rf"\b({'|'.join(_ANYWHERE)})\.", _I), _anywhere),
    (_compile(rf"\b({'|'.join(_WEEKDAYS)})\."), lambda m: _WEEKDAYS[m.group(1)]),
    (_compile(rf"(?<![\w']){_MONTH}(?<=\.)"), lambda m: _month_name(m.group(1))),
    (_compile(r"(?<![\w.])(?:[A-Za-z]\.){2,8}(?!\w)"), _initials),
    (_compile(rf"\b({_NUMBERED})\s({'|'.join(sorted(_ROMAN, key=len, reverse=True))})\b"), _roman_cardinal),
    (_compile(rf"\b({_REGAL})\s({'|'.join(sorted(_ROMAN, key=len, reverse=True))})\b"), _roman_ordinal),
    (_compile(r"(?<![\w'])([A-Z]{2,5})(s?)(?![\w'])"), _acronym),
    # Numbers of no special shape; letters glued to digits come apart.
    (_compile(r"#\s?(?=\d)"), _constant(" number ")),
    (_compile(r"[~≈]\s?(?=\d)"), _constant("about ")),
    (_compile(r"\b[CF]#(?!\w)"), lambda m: m.group(0)[0] + " sharp"),
    (_compile(r"\b[bcdfghjklmnpqrstvwxz]{2,3}(?=\d)"), _spelt_glued),
    (_compile(r"(?<=\d)k\b"), _constant(" K")),
    (_compile(r"(?<!\b0)(?<=\d)\s?[x×]\s?(?=\d)"), _constant(" by ")),
    (_compile(r"(?<=[A-Za-z])-?(?=\d)|(?<=\d)-?(?=[A-Za-z])"), _constant(" ")),
    (_compile(rf"(?<![\w.,)])[-+]{_NUM}"), lambda m: f" {_number(m.group(0))} "),
    (_compile(rf"{_NUM}|\.\d+"), lambda m: f" {_number(m.group(0))} "),
    # Symbols last. "/" between words is heard as a short pause at most.
    (_compile(r"(?<=[A-Za-z])/(?=[A-Za-z])"), _constant(" ")),
    (_compile(r"#(?=[A-Za-z])"), _constant("hashtag ")),
    (_compile(r"->|=>"), _constant(" to ")),
    (_compile(r"\s{2,}"), _constant(" ")),
    (_compile(r"\s-{1,3}\s|-{2,}|—|–"), _constant(" — ")),
    (_compile(r"\.{3,}"), _constant("… ")),
    (re.compile("[" + re.escape("".join(_SYMBOLS)) + "]"), _symbol),
    # What the rules left behind: doubled spaces and commas, spaces before marks.
    (_compile(r"\s{2,}"), _constant(" ")),
    (_compile(r",(?:\s?,)+"), _constant(",")),
    (_compile(r"\s?,\s?(?=[.!?;:])"), _constant("")),
    (_compile(r"\s([.,!?;:…])"), _group(r"\1")),
)

_PLAIN_MARKS = str.maketrans(
    {
        "’": "'", "‘": "'", "ʼ": "'", "‛": "'", "′": "'",
        "“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"',
        "″": '"', "−": "-", "‐": "-", "‑": "-", "‒": "–", "―": "—", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
        "⅓": " 1/3 ", "⅔": " 2/3 ", "⅛": " 1/8 ", "№": "No. ", "…": "...",
    }
)  # fmt: skip
# Emoji and other pictures (So), their modifiers (Sk), marks without a glyph (Cf), what Unicode does not name.
_DROPPED_KINDS = frozenset({"So", "Sk", "Cf", "Cc", "Cs", "Co", "Cn"})
_KEPT_SYMBOLS = frozenset("°^`|")


_MARKS = re.compile(f"[{re.escape(''.join(map(chr, _PLAIN_MARKS)))}]")
# Raised 2 and 3 are powers to a later rule; NFKC would make plain digits of them.
_COMPATIBILITY = re.compile("[^\x00-\x7f²³]+")
_NOT_ASCII = re.compile("[^\x00-\x7f]")

_RAISED_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_RAISED = re.compile(f"(?<=[0-9])(⁻?)([{_RAISED_DIGITS}]+)|[⁰¹⁴-⁹⁻]+")


def _raised(match: Match) -> str:
    """A power after a digit; after a letter the mark of a footnote, which is not read."""
    if not match.group(2):
        return " "
    if match.group(0) in ("²", "³"):
        return match.group(0)
    power = "".join(str(_RAISED_DIGITS.index(digit)) for digit in match.group(2))
    return f" to the power of {'minus ' if match.group(1) else ''}{power} "


def _plain(text: TracedText) -> TracedText:
    """Typographic marks, digits of other scripts and compatibility forms to plain ones; pictures dropped."""
    if text.text.isascii():
        return text
    text = text.sub(_MARKS, lambda m: m.group().translate(_PLAIN_MARKS)).sub(_RAISED, _raised)
    return text.sub(_COMPATIBILITY, lambda m: unicodedata.normalize("NFKC", m.group())).sub(_NOT_ASCII, _plain_one)


def _plain_one(match: Match) -> str:
    character = match.group()
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if character in "\ufe0e\ufe0f\u20e3":
        return ""
    is_dropped = kind in _DROPPED_KINDS and character not in _KEPT_SYMBOLS and not character.isspace()
    return " " if is_dropped else character


def normalize_english(text: str) -> str:
    """The text as it is said: numbers, money, dates, units, abbreviations and symbols in English words.

    Words and punctuation stay; no ASCII digit is left. Never raises.
    """
    return _in_english(TracedText.of(text)).text


def _in_english(text: TracedText) -> TracedText:
    text = _plain(text).single_spaced()
    for pattern, say in _RULES:
        text = text.sub(pattern, say)
    return text.single_spaced().strip(" ,;:", " ,")


# Segments.

_SENTENCE_END = re.compile(r"""(?:(?<![.!?…])[.!?…]+["'”’»)\]]*(?=\s))|(?:[。！？｡]+["'”’」』）】]*)""")
_CLAUSE_END = re.compile(
    r"""(?:[,;:…—–]["'”’»)\]]*(?=\s))|(?:(?:[，；：、､](?!\d)|(?<!\d)[，；：、､])["'”’」』）】]*)|(?<=[^\d\s])[—–](?=[^\d\s])"""
)
# Where a script without spaces must not be cut: between letters or digits of another, and beside a number's marks.
_INSIDE_WORD = re.compile(rf"[^\W{UNSPACED}]{{2}}|\d[%％°]")
_NUMBER_MARK = re.compile(r"\d[.,:/．，：](?=\d)|(?<=\d)[.,:/．，：]\d")
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*$")
_NEVER_LAST = frozenset(
    "dr mr mrs ms prof st gen col capt sgt lt rev gov sen rep hon mt ft pres e.g i.e vs no nos vol fig "
    "figs pp p cf ca "
    "approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_SELDOM_LAST = frozenset("etc inc ltd co corp jr sr u.s u.k u.n e.u a.m p.m u.s.a ph.d dept ave blvd rd al".split())
_SENTENCE_STARTERS = frozenset(
    "The A An It He She They We I You This That These Those There Here In On At But And So If When While "
    "What Why How "
    "Who Where Then For From After Before As My Our Your His Her Its Their No Yes Not One Some Most "
    "All".split()
)


def segment(text: str, *, max_chars: int = 120, min_chars: int = 15) -> list[str]:
    """Cut a text into pieces of at most `max_chars` characters, each to be spoken on its own.

    Cuts at sentence ends first, then inside what is still too long at clause punctuation, then at spaces;
    only a word longer than `max_chars`, or a script without spaces, is cut anywhere. Sentences under
    `min_chars` join a neighbour where both fit. Every character that is no space is kept, in order.

    Raises: InvalidRequest when `max_chars` is below 1.
    """
    if max_chars < 1:
        raise InvalidRequest(f"max_chars is {max_chars}: a piece holds at least 1 character", param="max_chars")
    pieces = [
        piece
        for sentence in _sentences(" ".join(text.split()))
        for piece in _fitting(sentence, max_chars=max_chars, min_chars=min_chars)
    ]
    return _joined(pieces, max_chars=max_chars, min_chars=min_chars)


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if _ends_sentence(text, start, match):
            yield text[start : match.end()].strip()
            start = match.end()
    if text[start:].strip():
        yield text[start:].strip()


def _ends_sentence(text: str, start: int, match: Match) -> bool:
    mark = match.group(0)
    following = text[match.end() :][:40].lstrip(" \"'“‘(«[")
    if not following or mark[0] in "。！？｡":
        return True
    if following[0].islower():
        # "Really?" he said. "Well ... perhaps."
        return False
    if mark[0] != ".":
        return True
    found = _LAST_WORD.search(text, max(start, match.start() - 20), match.start())
    word = found.group(0) if found else ""
    if word.lower() in _NEVER_LAST:
        return word.lower() == "no" and not following[0].isdigit()
    if word.lower() in _SELDOM_LAST or (len(word) == 1 and word.isupper()):
        return re.split(r"[\s,']", following, maxsplit=1)[0] in _SENTENCE_STARTERS
    return True


def _fitting(text: str, *, max_chars: int, min_chars: int) -> Iterator[str]:
    while len(text) > max_chars:
        cut = _best_cut(text, max_chars=max_chars, min_chars=min_chars)
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text


def _best_cut(text: str, *, max_chars: int, min_chars: int) -> int:
    """Where to cut: nearest to equal parts, at a clause end not too near either end, else at a space."""
    num_parts = -(-len(text) // max_chars)
    target = len(text) / num_parts
    # One character more: the look-ahead of a mark at the very limit.
    head = text[: max_chars + 1]
    earliest = max(min_chars, max_chars // 3)
    clauses = [m.end() for m in _CLAUSE_END.finditer(head)]
    clauses = [end for end in clauses if earliest <= end <= max_chars and len(text) - end >= min_chars]
    if clauses:
        return min(clauses, key=lambda end: abs(end - target))
    spaces = [i for i, character in enumerate(head) if character == " " and i > 0]
    # A target short of the limit must still leave a rest that fits in the parts planned.
    enough = [i for i in spaces if i >= len(text) - (num_parts - 1) * max_chars]
    if enough or spaces:
        return min(enough or spaces, key=lambda i: abs(i - target))
    # An accent stays with its letter.
    whole = [i for i in range(1, max_chars + 1) if not unicodedata.combining(text[i])]
    between = [i for i in whole if not _INSIDE_WORD.match(text, i - 1) and not _in_number(text, i)]
    return (between or whole or [max_chars])[-1]


def _in_number(text: str, cut: int) -> bool:
    """Whether a cut would fall beside a mark inside a number, as in 3.5 or 12:30."""
    return bool(_NUMBER_MARK.match(text, cut - 1) or (cut > 1 and _NUMBER_MARK.match(text, cut - 2)))


def _joined(pieces: list[str], *, max_chars: int, min_chars: int) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and min(len(joined[-1]), len(piece)) < min_chars and len(joined[-1]) + 1 + len(piece) <= max_chars:
            joined[-1] = f"{joined[-1]} {piece}"
        else:
            joined.append(piece)
    return joined
