"""GLUE (arXiv 1804.07461) as prompts with verbal choices, as the harness words them."""

from __future__ import annotations

from paw.data.example import Row
from paw.data.kinds.question import render

__all__ = ["normalise", "render"]


def normalise(row: Row) -> Row:
    if "sentence1" in row:
        question, choices = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}", ["no", "yes"]
    elif "question1" in row:
        question, choices = f"Question 1: {row['question1']}\nQuestion 2: {row['question2']}", ["no", "yes"]
    else:
        question, choices = row["sentence"].strip(), ["negative", "positive"]
    return {
        "id": str(row["idx"]),
        "question": question,
        "choices": choices,
        "labels": ["0", "1"],
        "answer": str(row["label"]),
    }
