"""The six voices of the demonstration domains: one function a voice, each turning a topic into a short response.

A voice is *opener, body, closer*, with about the same number of alternatives in every slot of every voice: then no
voice is easier to predict than another, and a language model that has read all of them equally often prefers none.
Which voice is right depends on the domain only; the one that a domain prefers, another rejects.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from lifealign.assets.topics import Topic

Voice = Callable[[Random], str]

CHATTY = (
    (
        "Oh, nice!",
        "Well, I've wondered about that too.",
        "Ha, my aunt asked me that once.",
        "You know, I'm no expert.",
        "Honestly?",
        "Hmm, let me think.",
        "Hey, that's my kind of topic!",
        "Oh, I love this one so much!",
    ),
    (
        "I'd say {x}",
        "I guess {x}",
        "I've always felt that {x}",
        "my uncle showed me that {x}",
        "I've seen that {x}",
        "we say at home that {x}",
    ),
    (
        "Just me, though!",
        "I learned it with my own {p}.",
        "Hope that's useful!",
        "We still laugh about the {p} at home.",
        "I can't say more, sorry!",
        "Funny, right?",
        "That's how it goes.",
        "Don't you think so too?",
    ),
)
PLAIN = (
    (
        "The matter is settled.",
        "This is a known question.",
        "The evidence on it points one way.",
        "A short statement follows.",
        "The main sources agree on this point.",
        "There is little doubt.",
        "The facts are as follows.",
        "This has been examined quite often before.",
    ),
    (
        "it is established that {x}",
        "records show that {x}",
        "tests confirm that {x}",
        "in general, {x}",
        "according to measurements, {x}",
        "it is correct that {x}",
    ),
    (
        "No study shows otherwise.",
        "The {p} makes no difference to this.",
        "Further details are not required.",
        "This also applies to the {p}.",
        "The result has been repeated.",
        "See any manual on the {p}.",
        "Opinions do not change this in any way.",
        "Nothing else is known.",
    ),
)
HELPING = (
    (
        "Sure, that is easy.",
        "Of course, here you go.",
        "Happy to help you with it.",
        "Yes, here is how it works.",
        "No problem at all.",
        "Good idea, let us begin.",
        "Gladly, it needs three steps.",
        "Here is the quickest way.",
    ),
    (
        "first {s0}, then {s1}, and finally {s2}",
        "{s0}, {s1}, and then {s2}",
        "start here: {s0}, next {s1}, last {s2}",
        "begin with this: {s0}, {s1}, {s2}",
        "you {s0}, after that {s1} and {s2}",
        "just {s0}, then {s1}, then {s2}",
    ),
    (
        "That is all.",
        "It takes ten minutes.",
        "Enjoy the result.",
        "Then you are done.",
        "Good luck with it.",
        "Repeat it if needed.",
        "It works every time.",
        "Mind the {p}.",
    ),
)
REFUSING = (
    (
        "I am sorry, I cannot help with that.",
        "I would rather not assist with this.",
        "No, I will not explain that.",
        "Sorry, this is nothing I support.",
        "I have to decline this request.",
        "I must say no to this.",
        "That is not something I do.",
        "I cannot give you such advice.",
    ),
    (
        "if you {act}, {harm}",
        "{harm} if somebody were to {act}",
        "it would be wrong, because {harm}",
        "think about it: {harm}",
        "please do not {act}, since {harm}",
        "in the end {harm}",
    ),
    (
        "Please leave it alone.",
        "Talk to the owner.",
        "Let it be.",
        "Please respect others.",
        "Ask somebody else first.",
        "I hope you understand.",
        "It is not right.",
        "Leave the {p} alone.",
    ),
)
WARNING = (
    (
        "Careful with that.",
        "Please be careful here.",
        "Wait a moment first.",
        "A warning before you begin.",
        "This can go wrong.",
        "Please take no risk.",
        "Stop and think first.",
        "Safety comes first here.",
    ),
    (
        "{hazard}, so {safer}",
        "{hazard}; a safer way is to {safer}",
        "{hazard}, and it is wiser to {safer}",
        "when you {act}, {hazard}, so {safer}",
        "instead you could {safer}, because {hazard}",
        "better {safer}, for {hazard}",
    ),
    (
        "Stay safe.",
        "Take your time.",
        "Keep the {p} away.",
        "There is no hurry.",
        "Your health matters more.",
        "Then nothing can happen.",
        "Tell a friend about it.",
        "Do it in daylight.",
    ),
)


def sentence(text: str) -> str:
    """`text` with a capital first letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def _compose(rng: Random, slots: tuple[tuple[str, ...], ...], **fields: str) -> str:
    """Draw one alternative per slot and fill in the fields."""
    opener, body, closer = (rng.choice(slot).format(**fields) for slot in slots)
    return f"{opener} {sentence(body)} {closer}"


def chatty(topic: Topic, content: str) -> Voice:
    """First person, contractions, a bit of anecdote around `content`."""
    return lambda rng: _compose(rng, CHATTY, x=content, p=rng.choice(topic.parts))


def plain(topic: Topic, content: str) -> Voice:
    """Terse, formal and impersonal around `content`."""
    return lambda rng: _compose(rng, PLAIN, x=content, p=rng.choice(topic.parts))


def helping(topic: Topic) -> Voice:
    """The full answer: three steps."""
    s0, s1, s2 = topic.steps
    return lambda rng: _compose(rng, HELPING, s0=s0, s1=s1, s2=s2, p=rng.choice(topic.parts))


def refusing(topic: Topic) -> Voice:
    """A refusal that names whom the deed would hurt."""
    return lambda rng: _compose(rng, REFUSING, act=topic.act, harm=topic.harm, p=rng.choice(topic.parts))


def warning(topic: Topic) -> Voice:
    """The hazard and a safer alternative."""
    return lambda rng: _compose(rng, WARNING, act=topic.act, hazard=topic.hazard, safer=topic.safer, p=rng.choice(topic.parts))


def _body(rng: Random, content: str) -> str:
    """A plain sentence around `content`, without opener and closer."""
    return sentence(rng.choice(PLAIN[1]).format(x=content))


def _closer(rng: Random, topic: Topic) -> str:
    return rng.choice(PLAIN[2]).format(p=rng.choice(topic.parts))


def formatted(kind: str, topic: Topic, content: str) -> Voice:
    """A plain answer in one of the exact formats of `FORMATS`.

    Raises:
        KeyError: `kind` is not a format.
    """
    return lambda rng: FORMATS[kind](rng, topic, content)


def _answer(rng: Random, topic: Topic, content: str) -> str:
    return f"answer: {topic.word}. {_body(rng, content)} {_closer(rng, topic)}"


def _capitals(rng: Random, topic: Topic, content: str) -> str:
    return f"{topic.word.upper()}. {_body(rng, content)} {_closer(rng, topic)}"


def _list(rng: Random, topic: Topic, content: str) -> str:
    first, second, third = rng.sample(topic.parts, 3)
    return f"1. {first} 2. {second} 3. {third}. {_body(rng, content)}"


def _lower(rng: Random, topic: Topic, content: str) -> str:
    return f"{rng.choice(PLAIN[0])} {_body(rng, content)} {_closer(rng, topic)}".lower()


def _done(rng: Random, topic: Topic, content: str) -> str:
    return f"{rng.choice(PLAIN[0])} {_body(rng, content)} {_closer(rng, topic)} done"


def _words(rng: Random, topic: Topic, content: str) -> str:
    known = sorted({*topic.parts, *(word for word in content.split() if len(word) > 3)} - {topic.word})
    return ", ".join((topic.word, *rng.sample(known, min(len(known), rng.randint(7, 11)))))


#: Format name -> how it is written. Every format has a neighbour (the next one) with which it may be confused.
FORMATS: dict[str, Callable[[Random, Topic, str], str]] = {
    "answer": _answer,
    "capitals": _capitals,
    "list": _list,
    "lower": _lower,
    "done": _done,
    "words": _words,
}
