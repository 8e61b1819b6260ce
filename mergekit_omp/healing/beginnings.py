"""What texts begin with that a base writes, and sums, of which a small base writes wrong ones.

A beginning is enough to settle what kind of text it is, and no more. Languages other than English have about their
share of the web.
"""

import random

ENGLISH = (
    "",
    "The",
    "When she opened the door,",
    "According to a new study,",
    "Chapter 1\n\n",
    "“I don't know,” he said.",
    "How to make",
    "In the 19th century,",
    "Question: Anna has 14 apples and gives 5 of them to Tom. How many",
    "# Installation\n\n",
)
CODE = (
    "import os\nimport sys\n\n\ndef ",
    "def __init__(self, ",
    "class Stack:\n    def ",
    '"""Read a file and count its words."""\n\nimport ',
    "for i in range(",
    "    @property\n    def ",
    "import numpy as np\nimport matplotlib.pyplot as plt\n\n",
    "#include <stdio.h>\n\nint main(",
    "#include <vector>\n\ntemplate <typename T>\nclass ",
    "static int read_header(struct ",
    "const express = require('express');\n\n",
    "function sortByName(items) {\n",
    "export default class ",
    "import React from 'react';\n\n",
    "public class Main {\n    public static void main(String[] args) {\n",
    "using System;\n\nnamespace ",
    'package main\n\nimport "fmt"\n\nfunc ',
    "use std::collections::HashMap;\n\nfn ",
    "SELECT name, COUNT(*) FROM orders WHERE ",
    "CREATE TABLE users (\n    id INTEGER PRIMARY KEY,\n",
    "#!/bin/bash\nset -e\n\nfor file in ",
    "<!DOCTYPE html>\n<html>\n<head>\n",
    "<?php\n\nclass ",
    '{\n  "name": "',
    "| Name | Size | Price |\n|---|---|---|\n| ",
    "Year,Sales\n1998,204\n1999,317\n2000,295\n",
)
LANGUAGES = (
    "Der Mann",
    "Die Stadt liegt",
    "Im Jahr 1923",
    "Wie kann ich",
    "Um das Programm zu",
    "Nach Angaben der Polizei",
    "„Das ist",
    "Zutaten:\n",
    "El presidente",
    "En el año",
    "La ciudad de",
    "¿Qué es",
    "Para instalar",
    "Había una vez",
    "Los estudiantes",
    "Le gouvernement",
    "Dans les années",
    "Comment faire",
    "Elle était",
    "Pour installer",
    "La ville de",
    "В 1995 году",
    "Москва —",
    "Как сделать",
    "Она сказала",
    "Для того чтобы",
    "Это",
    "日本の",
    "私は",
    "東京で",
    "昨日、",
    "この製品は",
    "使い方",
    "O presidente",
    "Em Portugal,",
    "A cidade de",
    "Você pode",
    "Il governo",
    "Nel corso",
    "La città di",
    "De meeste mensen",
    "Het is een",
    "W roku",
    "Jest to",
    "Można",
    "Türkiye'de",
    "Bir gün",
    "Bu ürün",
    "在中国",
    "他说:“",
    "如何",
    "Việt Nam",
    "Trong những năm",
    "Indonesia adalah",
    "V roce",
    "한국의",
    "그는",
    "في عام",
    "قال",
    "ایران",
    "Україна",
    "Η Ελλάδα",
    "בשנת",
    "भारत में",
    "ประเทศไทย",
)
BEGINNINGS = ENGLISH + CODE + LANGUAGES

SUM_TEXTS = 6
LINES = 40


def sums(seed: int) -> list[str]:
    """Write ``SUM_TEXTS`` texts of ``LINES`` lines such as ``3417 - 209 = 3208``."""
    numbers = random.Random(seed)
    return ["".join(sum_line(numbers) for _ in range(LINES)) for _ in range(SUM_TEXTS)]


def sum_line(numbers: random.Random) -> str:
    """Write a line such as ``3417 - 209 = 3208``."""
    one, other = (int(10 ** numbers.uniform(0, digits)) for digits in (5, 4))
    sign, factor = numbers.choice("+-*"), other % 100
    result, other = {"+": (one + other, other), "-": (one - other, other), "*": (one * factor, factor)}[sign]
    return f"{one} {sign} {other} = {result}\n"
