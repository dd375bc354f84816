"""What the benchmarks speak: plain sentences of 20 to 110 characters, and texts of a wanted length made of them."""

from __future__ import annotations

SENTENCES = (
    "The kettle is on and the bread is almost done.",
    "Nobody had told him that the last train left at nine.",
    "Please close the gate, or the goats will be in the garden again.",
    "Rain is expected in the north, with bright spells along the coast later on.",
    "She counted the coins twice.",
    "A small boat came round the point, and everyone on the pier began to wave.",
    "We can meet on Thursday, if the weather holds.",
    "The old clock in the hall has been seven minutes slow since spring.",
    "His answer was short, and not very kind.",
    "Take the second street on the left and walk until you can smell the bakery.",
    "There were apples on the table, pears on the shelf, and wasps on both.",
    "The library opens at ten.",
    "I have read the letter, and I still do not know what she wants from us.",
    "Turn the handle slowly and wait for the green light.",
    "Two of the lamps were broken, so they played chess by candle light until midnight.",
    "My brother keeps bees behind the church.",
    "The results will be published tomorrow morning, together with the data and a short note on the method.",
    "It was quiet in the valley, and snow had covered the road.",
    "Could you bring the blue folder when you come upstairs?",
    "They sold the farm, bought a van, and were not seen again before the autumn.",
)


def text_of_length(num_chars: int, *, skip: int) -> str:
    """Words of the sentences, beginning with sentence `skip`, that together take about `num_chars` characters."""
    order = [SENTENCES[(skip + i) % len(SENTENCES)] for i in range(len(SENTENCES))]
    words = " ".join(order).split()
    text = words[0]
    for word in words[1:]:
        if len(text) + 1 + len(word) > num_chars:
            break
        text += f" {word}"
    return text.rstrip(".,") + "."
