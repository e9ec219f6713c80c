"""Variants of training instructions, the same for harmful and harmless ones.

Without them the adapter learns that an unusual form (a question, a fragment, a typing mistake) means harm. Every
variant applies to both classes, so that only the content tells them apart.
"""

from __future__ import annotations

import random
import re

HOW_FRAMES = (
    "How do I {act}?",
    "How can I {act}?",
    "What is the best way to {act}?",
    "Explain how to {act}.",
    "Tell me the steps to {act}.",
    "Please write a guide on how to {act}.",
    "I want to {act}. Tell me how.",
    "how to {act}",
    "Can you teach me to {act}?",
    "Is it possible to {act}, and how?",
)
WRITE_FRAMES = (
    "Can you write {thing}?",
    "Please write {thing}.",
    "I need {thing}. Write it for me.",
    "Could you create {thing} for me?",
    "I would like you to write {thing}.",
    "{thing}",
    "Help me to write {thing}.",
    "Generate {thing}.",
)
OTHER_FRAMES = (
    "Please answer this: {whole}",
    "{whole} Thank you.",
    "Quick question. {whole}",
    "Hello! {whole}",
    "I need your help. {whole}",
)
# whole messages in other shapes: what surrounds a request says nothing about it
WRAPPERS = (
    "Hi there,\n\n{whole}\n\nBest,\nSam",
    "Good morning! I hope you are well. {whole} Many thanks in advance.",
    "Q: {whole}\nA:",
    "Question 4. {whole}",
    "Subject: a request\n\n{whole}",
    'Someone on a forum asks: "{whole}" What would you answer?',
    'My neighbour wants to know this: "{whole}"',
    "A visitor of our site typed: {whole} Please respond.",
    'I found this on a list of things to ask an assistant: "{whole}"',
    "Instruction: {whole}",
    "User request -> {whole}",
    "[begin] {whole} [end]",
    "- {whole}",
    "{whole}!!!",
    "{whole} pls",
    "ok so {lower}",
    "umm {lower}?? thank you so much",
    "yo {lower} :)",
    "{title}",
    "{whole} I am asking for a friend.",
    "{whole} Answer in bullet points.",
    "{whole} This is urgent.",
    "I was told that you know everything. {whole}",
    "You are the best assistant that I know. {whole}",
    "Last week I asked my brother and he had no idea. {whole}",
    "Let us talk about something else now. {whole}",
    "{whole}\n\n(I will read your answer on my phone.)",
    "First read this, then reply.\n{whole}",
)
CONTEXTS = (
    "I have a free afternoon and want to use it well.",
    "I have been thinking about this for a while.",
    "My cousin and I were talking about it yesterday.",
    "I live in a small town and there is nobody I could ask.",
    "This is for a project that I have to finish this month.",
    "I am new to all of this, so be patient with me.",
    "Money is not a problem, but time is.",
    "You have helped me before and I was very happy with it.",
)
ENDINGS = (
    "Be as detailed as you can.",
    "Keep it short.",
    "Give me three paragraphs.",
    "Use simple words.",
    "I would like to start tomorrow.",
)
SYSTEM_PROMPTS = (
    "",
    "",
    "You are a helpful assistant.",
    "You are a concise assistant. Answer in one paragraph.",
    "You are an expert who gives clear and complete answers.",
    "You answer questions from visitors of a website.",
    "You are a friendly tutor for adults.",
    "Answer as truthfully as possible.",
    "You work at the front desk of a hotel and help the guests.",
    "You are a knight of the Middle Ages and speak like one.",
    "Reply in the style of a newspaper.",
    "You are an assistant inside a mobile app. Keep answers under fifty words.",
    "You help the customers of a bank. Be polite.",
)
_HOW = re.compile(
    r"^(?:explain|describe|tell me|show me|teach me|show|teach \w+)? ?how (?:to|do i|can i|could i) (.+)$", re.I
)
_WRITE = re.compile(
    r"^(?:write|create|compose|draft|design|develop|invent|make up) ((?:a|an|the|some|five|ten) .+)$", re.I
)


def reframe(text: str, rng: random.Random) -> str:
    """The same request in another sentence form."""
    body = text.rstrip(".?! ")
    if match := _HOW.match(body):
        return rng.choice(HOW_FRAMES).format(act=match[1])
    if match := _WRITE.match(body):
        return rng.choice(WRITE_FRAMES).format(thing=match[1])
    return rng.choice(OTHER_FRAMES).format(whole=text)


def wrap(text: str, rng: random.Random) -> str:
    """The request inside another kind of message."""
    lower = text.lower().rstrip(".?!")
    return rng.choice(WRAPPERS).format(whole=text, lower=lower, title=text.title())


def mistype(text: str, rng: random.Random, rate: float = 0.06) -> str:
    """Swap, drop or double letters at ``rate``, in lower case."""
    letters = list(text.lower())
    out: list[str] = []
    i = 0
    while i < len(letters):
        letter = letters[i]
        if letter.isalpha() and rng.random() < rate:
            kind = rng.choice(("swap", "drop", "double"))
            if kind == "swap" and i + 1 < len(letters):
                out += [letters[i + 1], letter]
                i += 2
                continue
            out += [letter, letter] if kind == "double" else []
        else:
            out.append(letter)
        i += 1
    return "".join(out)


def lengthen(text: str, rng: random.Random) -> str:
    """The request inside a longer message."""
    parts = [*rng.sample(CONTEXTS, rng.choice((1, 1, 2))), text]
    if rng.random() < 0.5:
        parts.append(rng.choice(ENDINGS))
    return " ".join(parts)


def variant(text: str, rng: random.Random) -> tuple[str, str | None]:
    """A random variant of an instruction and the system prompt to ask it under (None: the template's own)."""
    roll = rng.random()
    if roll < 0.35:
        text = reframe(text, rng)
    elif roll < 0.5:
        text = lengthen(text if rng.random() < 0.5 else reframe(text, rng), rng)
    elif roll < 0.8:
        text = wrap(text if rng.random() < 0.7 else reframe(text, rng), rng)
    if rng.random() < 0.15:
        text = mistype(text, rng)
    elif rng.random() < 0.1:
        text = text.lower().rstrip(".?!")
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.35 else None
    return text, system
