"""SQuAD files small enough to read in a test, in the words of ``tiny.tokenizer``."""

import json

from tiny import WORDS

CONTEXTS = ("the good film", "a bad the plot a", "film the a the a the fine the", "poor the a plot the a the a the")


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
    """Asked "very", the answer is the adjective of the context, asked "a" it is the noun; asked "not" there is none."""
    paragraphs = []
    for index, context in enumerate(CONTEXTS * 4):
        adjective, noun = (next(word for word in context.split() if word in some) for some in (WORDS[:6], WORDS[6:8]))
        questions = [(f"{index}-very", "very", [adjective]), (f"{index}-a", "a", [noun])]
        if unanswerable:
            questions.append((f"{index}-not", "not", []))
        paragraphs.append(paragraph(context, *questions))
    return [article("one", *paragraphs[:8]), article("two", *paragraphs[8:])]
