"""SQuAD files small enough to read in a test, in the words of ``tiny.tokenizer``."""

import json

from tiny import WORDS

CONTEXTS = ("the good film", "not a bad plot", "very fine plot the awful film", "the poor film a great plot")


def paragraph(context, *questions):
    """``questions``: (id, question, answers); an answer is a text of the context, at its first place."""
    qas = [
        {
            "id": identity,
            "question": question,
            "answers": [{"text": text, "answer_start": context.index(text)} for text in answers],
        }
        for identity, question, answers in questions
    ]
    return {"context": context, "qas": qas}


def article(title, *paragraphs):
    return {"title": title, "paragraphs": list(paragraphs)}


def write(path, *articles):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": list(articles)}))
    return path


def learnable(unanswerable=False):
    """Questions that name an adjective, whose answer is the word after it; or, on request, have none."""
    paragraphs = []
    for index, context in enumerate(CONTEXTS * 4):
        words = context.split()
        asked = [word for word in words[:-1] if word in WORDS[:6]]
        questions = [(f"q{index}-{word}", word, [words[words.index(word) + 1]]) for word in asked]
        if unanswerable:
            absent = next(word for word in WORDS[:6] if word not in words)
            questions.append((f"q{index}-none", absent, []))
        paragraphs.append(paragraph(context, *questions))
    return [article("one", *paragraphs[:8]), article("two", *paragraphs[8:])]
