"""The program that `heaptap demo` attaches to: a shop whose sessions are never forgotten.

Every request makes some temporary memory, which is given back, and a session, which is not. It ends when its standard
input does.
"""

import sys
import threading
import time


class Session:
    def __init__(self, user):
        self.user = user
        self.history = bytearray(2000 + user % 500)


class Shop:
    def __init__(self):
        self.sessions = {}

    def remember(self, user):
        self.sessions[user] = Session(user)

    def render(self, user):
        page = bytearray(20_000)
        page[:8] = b"welcome "
        return len(page) + user

    def handle(self, user):
        self.remember(user)
        return self.render(user)


def serve(shop, first):
    user = first
    while True:
        shop.handle(user)
        user += 2
        time.sleep(0.002)


shop = Shop()
for number in (0, 1):
    threading.Thread(target=serve, args=(shop, number), name="worker-%d" % number, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
