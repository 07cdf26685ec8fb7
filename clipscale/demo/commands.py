"""Home commands: what is said to a house, and which of it is kept from training.

An intent is an action, an object and a location. Every phrasing exists for every intent; the held-out ones are other
sentences, not the trained ones with a word exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

OBJECTS = ("lights", "heating", "music")
LOCATIONS = ("kitchen", "bedroom", "bathroom", "office")


@dataclass(frozen=True)
class Action:
    """What is to happen, and how people say it; `{object}` and `{location}` are filled in."""

    key: str
    name: str
    """The phrase that names the intent."""
    phrasings: tuple[str, ...]
    """Heard in training."""
    held_out: tuple[str, ...]
    """Heard in evaluation only."""


ACTIONS = (
    Action(
        key="turn_on",
        name="turn on the {object} in the {location}",
        phrasings=(
            "turn on the {object} in the {location}",
            "switch on the {location} {object}",
            "please turn the {location} {object} on",
            "{location} {object} on",
            "let us have the {object} on in the {location} please",
            "can you switch the {object} on in the {location}",
            "in the {location} turn on the {object}",
            "I want to have the {object} on in the {location}",
        ),
        held_out=(
            "could we get the {location} {object} turned on",
            "put the {object} on in my {location}",
            "make sure that the {location} has its {object} on",
        ),
    ),
    Action(
        key="turn_off",
        name="turn off the {object} in the {location}",
        phrasings=(
            "turn off the {object} in the {location}",
            "switch off the {location} {object}",
            "please turn the {location} {object} off",
            "{location} {object} off",
            "let us have the {object} off in the {location} please",
            "can you switch the {object} off in the {location}",
            "in the {location} turn off the {object}",
            "I want to have the {object} off in the {location}",
        ),
        held_out=(
            "could we get the {location} {object} turned off",
            "shut the {object} off in my {location}",
            "make sure that the {location} has its {object} off",
        ),
    ),
)


@dataclass(frozen=True)
class Intent:
    """One thing that can be asked for."""

    action: Action
    object: str
    location: str

    @property
    def key(self) -> str:
        """Such as `turn_on_lights_kitchen`."""
        return f"{self.action.key}_{self.object}_{self.location}"

    @property
    def name(self) -> str:
        """Such as "turn on the lights in the kitchen"."""
        return self.say(self.action.name)

    @property
    def slots(self) -> dict[str, str]:
        """Its parts, as phrases."""
        return {"action": self.action.key.replace("_", " "), "object": self.object, "location": self.location}

    def say(self, phrasing: str) -> str:
        """A phrasing, filled in."""
        return phrasing.format(object=self.object, location=self.location)


INTENTS = tuple(Intent(*parts) for parts in product(ACTIONS, OBJECTS, LOCATIONS))
