"""Short texts of many kinds: what a model's linears read on them stands for what they will read."""

TEXTS = (
    "The glacier lake had frozen over by November, and for three winters in a row the villagers cut blocks of ice from"
    " it and sold them in the capital.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    yield total / width\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n        yield total / width\n",
    "To do before Friday:\n1. Renew the library card\n2. Water the plants\n3. Call the dentist\n4. Fix the gate\n"
    "5. Return the borrowed ladder\n",
    "“Where were you last night?” she asked. He looked at the floor. “At the station,” he said, “waiting for a train"
    " that never came.”",
    "Die Bibliothek ist montags geschlossen. Wer ein Buch zurückgeben möchte, kann es in den Kasten neben der Tür"
    " werfen.",
    "Le conseil municipal a voté hier soir la construction d'une nouvelle école, malgré les réserves de plusieurs"
    " habitants du quartier.",
    "昨天下了一整天的雨，今天早上终于放晴了。孩子们在公园里放风筝。",
    "Q: A train leaves at 14:35 and arrives at 17:10. How long is the journey?\nA: From 14:35 to 17:10 it is"
    " 2 hours and 35 minutes, that is 155 minutes.",
    '{"name": "sensor-12", "unit": "celsius", "readings": [18.4, 18.9, 19.3], "ok": true, "note": null}',
    "Sound travels through air at about 343 metres per second, v = sqrt(gamma * R * T / M), and more than four times"
    " as fast through water.",
    "SELECT customer.name, SUM(invoice.amount) AS total FROM invoice JOIN customer ON customer.id = invoice.customer_id"
    " WHERE invoice.year = 2021 GROUP BY customer.name;",
    "Section 4. The tenant shall keep the premises in good repair. The landlord may enter them with two days' notice,"
    " or at once where there is danger to life or property.",
)
