// What the client does when time, pages and networks misbehave. The gateway here only stages failures: it keeps the
// contract of docs/protocol.md, and cuts, refuses and stays silent when told to. Time is virtual; schedules are drawn
// from a seed that is printed.
import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";

const { ClusterCode, ClusterCodeError, swap } = await import("../../gateway/static/cluster-code.js");

/** Virtual time: `run` lets it pass. */
class Clock {
  now = 1000;
  timers = new Map();
  next = 1;

  set = (work, delay = 0) => {
    this.timers.set(this.next, { at: this.now + Math.max(0, delay), work });
    return this.next++;
  };

  clear = (id) => void this.timers.delete(id);

  async run(milliseconds) {
    const end = this.now + milliseconds;
    await settle();
    for (;;) {
      const due = [...this.timers]
        .filter(([, { at }]) => at <= end)
        .sort((a, b) => a[1].at - b[1].at || a[0] - b[0])[0];
      if (!due) break;
      this.timers.delete(due[0]);
      this.now = Math.max(this.now, due[1].at);
      due[1].work();
      await settle();
    }
    this.now = end;
  }
}

const real = { setTimeout, clearTimeout, now: performance.now.bind(performance), random: Math.random, setImmediate };
const settle = () => new Promise((resolve) => real.setImmediate(resolve));

/** mulberry32: small and good enough to draw schedules. */
function drawing(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

let clock;
let gateway;

/** A gateway that keeps the contract, over sockets whose frames take time. */
class Gateway {
  epoch = "e1";
  log = [];
  first = 1;
  sockets = [];
  most = 0;
  refusing = false;
  forbidden = new Set();
  latency = () => 5;
  batch = false;
  asked = [];

  get head() {
    return this.first + this.log.length - 1;
  }

  publish(channel, data = {}) {
    const event = { event_type: "test.event", channel, data, offset: this.first + this.log.length };
    this.log.push(event);
    for (const socket of this.sockets) if (socket.channels.has(channel)) socket.give(event);
    return event.offset;
  }

  /** The log is deleted and begins anew. */
  renew() {
    [this.epoch, this.log, this.first] = [`${this.epoch}x`, [], 1];
    for (const socket of [...this.sockets]) socket.drop(4010);
  }

  /** What is kept begins now. */
  forget() {
    this.first += this.log.length;
    this.log = [];
  }

  after(offset, channels) {
    return this.log.filter((event) => event.offset > offset && channels.has(event.channel));
  }

  can(position) {
    const [epoch, offset] = position.split(":");
    return epoch === this.epoch && Number(offset) >= this.first - 1;
  }
}

class Socket {
  readyState = 0;
  onmessage = null;
  onclose = null;
  channels = new Set();
  silent = false;

  constructor(url, protocols) {
    this.url = new URL(url);
    this.protocols = protocols;
    gateway.asked.push(this.url);
    gateway.sockets.push(this);
    gateway.most = Math.max(gateway.most, gateway.sockets.filter((one) => one.readyState < 3).length);
    clock.set(() => this.accept(), gateway.latency());
  }

  accept() {
    if (this.readyState !== 0) return;
    const names = (this.url.searchParams.get("channels") ?? "").split(",").filter(Boolean);
    if (gateway.refusing || names.some((name) => gateway.forbidden.has(name))) return this.drop(1006);
    this.readyState = 1;
    this.channels = new Set(["user:1", ...names]);
    const since = this.url.searchParams.get("since");
    const recovered = since === null || gateway.can(since);
    const position = since && recovered ? since : `${gateway.epoch}:${gateway.head}`;
    const data = {
      connection_id: "c",
      position,
      channels: [...this.channels],
      ping_interval: 25,
      expires_at: null,
      recovered,
    };
    this.give({ event_type: "connected", channel: "user:1", data });
    for (const event of gateway.after(Number(position.split(":")[1]), this.channels)) this.give(event);
  }

  give(message) {
    const frame = JSON.stringify(gateway.batch ? [message] : message);
    // Later frames never overtake earlier ones.
    this.last = Math.max(this.last ?? 0, clock.now + gateway.latency());
    clock.set(() => !this.silent && this.readyState === 1 && this.onmessage?.({ data: frame }), this.last - clock.now);
  }

  send(text) {
    clock.set(() => this.readyState === 1 && !this.silent && this.act(JSON.parse(text)), 1);
  }

  act({ action, channel, since, id, token }) {
    gateway.actions?.push({ action, channel, since, id, token });
    if (action === "ping") return this.give({ event_type: "pong", channel: "user:1", data: {} });
    if (action === "refresh")
      return this.give({ event_type: "pong", channel: "user:1", data: { id, expires_at: null } });
    if (action === "unsubscribe") {
      this.channels.delete(channel);
      return this.give({ event_type: "unsubscribed", channel, data: { id } });
    }
    if (gateway.forbidden.has(channel)) {
      const data = { code: "not_found", message: "There is no such session.", temporary: false, id };
      return this.give({ event_type: "error", channel, data });
    }
    const recovered = !since || gateway.can(since);
    const missed = since && recovered ? gateway.after(Number(since.split(":")[1]), new Set([channel])) : [];
    for (const event of missed) this.give(event);
    this.channels.add(channel);
    const position = `${gateway.epoch}:${gateway.head}`;
    this.give({ event_type: "subscribed", channel, data: { position, recovered, replayed: missed.length, id } });
  }

  close() {
    if (this.readyState >= 2) return;
    this.readyState = 2;
    gateway.sockets = gateway.sockets.filter((one) => one !== this);
    // On a dead network the close is never answered.
    if (!this.silent) clock.set(() => this.drop(1005), gateway.latency());
  }

  drop(code) {
    if (this.readyState === 3) return;
    this.readyState = 3;
    gateway.sockets = gateway.sockets.filter((one) => one !== this);
    clock.set(() => this.onclose?.({ code }), 0);
  }
}

beforeEach(() => {
  clock = new Clock();
  gateway = new Gateway();
  globalThis.setTimeout = clock.set;
  globalThis.clearTimeout = clock.clear;
  performance.now = () => clock.now;
  const page = new EventTarget();
  globalThis.document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  globalThis.addEventListener = page.addEventListener.bind(page);
  globalThis.removeEventListener = page.removeEventListener.bind(page);
  globalThis.dispatchEvent = page.dispatchEvent.bind(page);
});

afterEach(() => {
  Object.assign(globalThis, { setTimeout: real.setTimeout, clearTimeout: real.clearTimeout });
  performance.now = real.now;
  Math.random = real.random;
  for (const name of ["document", "addEventListener", "removeEventListener", "dispatchEvent"]) delete globalThis[name];
});

function make(options = {}) {
  const client = new ClusterCode({ url: "http://gateway", auth: async () => "short", WebSocket: Socket, ...options });
  const told = { states: [], errors: [], lost: [], events: [] };
  client.on("state", (change) => told.states.push(change));
  client.on("error", (error) => told.errors.push(error));
  client.on("lost", (notice) => told.lost.push(notice));
  client.on("event", (event) => told.events.push(event.offset));
  return { client, told };
}

const states = (told) => told.states.map(({ state }) => state);

test("it connects with the token among the subprotocols, subscribes, and gets events in order", async () => {
  const { client, told } = make();
  const seen = [];
  client.subscribe("app:1", (event) => seen.push(event.offset));
  client.connect();
  client.connect();
  await clock.run(100);
  assert.equal(gateway.asked.length, 1);
  assert.equal(gateway.asked[0].href, "ws://gateway/ws?batch=1&channels=app%3A1");
  assert.deepEqual(gateway.sockets[0].protocols, ["cluster-code.v1", "bearer.short"]);
  for (let n = 0; n < 3; n++) gateway.publish("app:1");
  gateway.publish("user:1");
  gateway.publish("app:2");
  await clock.run(100);
  assert.deepEqual(seen, [1, 2, 3]);
  assert.deepEqual(told.events, [1, 2, 3, 4]);
  assert.equal(client.position, "e1:4");
  assert.deepEqual(states(told), ["connecting", "connected"]);
  client.close();
  await clock.run(100);
  assert.equal(client.state, "closed");
  assert.equal(clock.timers.size, 0);
});

test("cut off, it resumes after what it has handled, and misses nothing", async () => {
  const { client, told } = make();
  client.subscribe("app:1");
  client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  await clock.run(10);
  gateway.sockets[0].drop(1006);
  gateway.publish("app:1");
  gateway.publish("user:1");
  await clock.run(1000);
  assert.equal(gateway.asked[1].searchParams.get("since"), "e1:1");
  assert.deepEqual(told.events, [1, 2, 3]);
  assert.equal(told.states.find(({ state }) => state === "waiting").code, 1006);
  client.close();
});

test("a code of 4500 or above stops it with a sentence, a lower one does not", async () => {
  const { client, told } = make();
  client.connect();
  await clock.run(100);
  gateway.sockets[0].drop(4001);
  await clock.run(1000);
  assert.equal(client.state, "connected");
  gateway.sockets[0].drop(4500);
  await clock.run(60_000);
  assert.equal(client.state, "stopped");
  assert.equal(told.states.at(-1).code, 4500);
  assert.ok(told.errors.at(-1) instanceof ClusterCodeError);
  assert.equal(told.errors.at(-1).message, "The token is not valid any more: sign in again.");
  assert.equal(gateway.asked.length, 2);
  assert.equal(clock.timers.size, 0);
  client.connect();
  await clock.run(100);
  assert.equal(client.state, "connected");
  client.close();
});

test("the waits are drawn from 0 to 0.5 s, doubled with each failure, up to 20 s", async () => {
  const { client, told } = make();
  gateway.refusing = true;
  Math.random = () => 0.999_999;
  client.connect();
  await clock.run(120_000);
  const waits = told.states.filter(({ state }) => state === "waiting").map(({ delay }) => Math.round(delay));
  assert.deepEqual(waits.slice(0, 8), [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 20_000]);
  Math.random = () => 0;
  client.close();
});

test("a token that is refused stops it, one that cannot be had now is tried again", async () => {
  let failure = new ClusterCodeError("Sign in again.", { code: 401, fatal: true });
  const { client, told } = make({
    auth: async () => {
      if (failure) throw failure;
      return "short";
    },
  });
  client.connect();
  await clock.run(60_000);
  assert.equal(client.state, "stopped");
  assert.deepEqual(told.errors, [failure]);
  failure = new ClusterCodeError("Too many.", { code: 429, retryAfter: 30 });
  client.connect();
  await clock.run(29_000);
  assert.equal(client.state, "waiting");
  failure = null;
  await clock.run(2000);
  assert.equal(client.state, "connected");
  client.close();
});

test("history that is gone is told, with the position that all goes on from", async () => {
  const { client, told } = make();
  client.subscribe("app:1");
  client.connect();
  await clock.run(100);
  gateway.sockets[0].drop(1006);
  gateway.publish("app:1");
  gateway.forget();
  await clock.run(1000);
  assert.deepEqual(told.lost, [{ channels: ["user:1", "app:1"], position: "e1:1" }]);
  gateway.renew();
  await clock.run(2000);
  gateway.publish("app:1");
  await clock.run(100);
  assert.deepEqual(told.lost[1], { channels: ["user:1", "app:1"], position: "e1x:0" });
  assert.deepEqual(told.events, [1]);
  client.close();
});

test("what follows a channel loads its state first, applies what came meanwhile, and loads again after a loss", async () => {
  const { client, told } = make();
  const shown = [];
  let answer;
  const end = client.follow(
    "app:1",
    () => new Promise((resolve) => (answer = resolve)).then(() => shown.push("state")),
    ({ offset }) => shown.push(offset),
  );
  client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  await clock.run(100);
  assert.deepEqual(shown, []);
  answer();
  await clock.run(1);
  gateway.publish("app:1");
  await clock.run(100);
  assert.deepEqual(shown, ["state", 1, 2]);
  gateway.sockets[0].drop(1006);
  gateway.publish("app:1");
  gateway.forget();
  await clock.run(1000);
  gateway.publish("app:1");
  await clock.run(100);
  answer();
  await clock.run(1);
  assert.deepEqual(shown, ["state", 1, 2, "state", 4]);
  end();
  await clock.run(100);
  assert.deepEqual([...gateway.sockets[0].channels], ["user:1"]);
  client.close();
});

test("a load that fails is tried again, and said", async () => {
  const { client, told } = make();
  let tries = 0;
  const shown = [];
  client.follow(
    "app:1",
    async () => {
      if (++tries < 3) throw new Error("no");
    },
    ({ offset }) => shown.push(offset),
  );
  client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  await clock.run(3000);
  assert.deepEqual(
    [tries, shown, told.errors.map(String)],
    [3, [1], Array(2).fill("ClusterCodeError: The state of app:1 could not be loaded.")],
  );
  client.close();
  await clock.run(100);
  assert.equal(clock.timers.size, 0);
});

test("a replay that was cut off goes on where it was, and does not move the connection's position", async () => {
  const { client, told } = make();
  for (let n = 0; n < 5; n++) gateway.publish("app:1");
  client.connect();
  await clock.run(100);
  assert.equal(client.position, "e1:5");
  const seen = [];
  gateway.latency = () => 10;
  client.subscribe(
    "app:1",
    ({ offset }) => {
      seen.push(offset);
      if (offset === 3) gateway.sockets[0].drop(1006);
    },
    { since: "e1:1" },
  );
  gateway.actions = [];
  await clock.run(2000);
  assert.deepEqual(seen, [2, 3, 4, 5]);
  assert.deepEqual(
    gateway.actions.map(({ since }) => since),
    ["e1:1", "e1:3"],
  );
  assert.equal(client.position, "e1:5");
  assert.deepEqual(told.lost, []);
  client.close();
});

test("left and taken again at once, a channel's replay is not lost among what still comes", async () => {
  const { client } = make();
  const seen = [];
  const note = ({ offset }) => seen.push(offset);
  const end = client.subscribe("app:1", note);
  client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  await clock.run(100);
  gateway.publish("app:1");
  end();
  client.subscribe("app:1", note, { since: "e1:0" });
  gateway.publish("app:1");
  await clock.run(100);
  assert.deepEqual(seen, [1, 1, 2, 3]);
  client.close();
});

test("one channel that is refused is told, and takes no other with it", async () => {
  const { client, told } = make();
  client.subscribe("session:1");
  client.subscribe("session:2");
  client.connect();
  await clock.run(100);
  gateway.sockets[0].drop(1006);
  gateway.forbidden.add("session:2");
  gateway.publish("session:1");
  await clock.run(10_000);
  gateway.publish("session:1");
  await clock.run(100);
  assert.equal(client.state, "connected");
  assert.deepEqual(client.channels, ["session:1"]);
  assert.deepEqual(told.events, [1, 2]);
  assert.deepEqual(
    told.errors.map(({ code, channel }) => [code, channel]),
    [["not_found", "session:2"]],
  );
  client.close();
});

test("silence is asked about, and a connection that does not answer is given up", async () => {
  const { client, told } = make();
  client.connect();
  await clock.run(100);
  gateway.actions = [];
  await clock.run(120_000);
  assert.ok(gateway.actions.length >= 3);
  assert.equal(gateway.asked.length, 1);
  gateway.sockets[0].silent = true;
  await clock.run(25_000 + 10_000 + 1000 + 25_000 + 3000);
  assert.equal(gateway.asked.length, 2);
  assert.equal(client.state, "connected");
  client.close();
  await clock.run(100);
  assert.equal(clock.timers.size, 0);
});

test("back in sight or online it looks at once, and does not wait for the next attempt", async () => {
  const { client } = make();
  Math.random = () => 0.999;
  client.connect();
  await clock.run(100);
  gateway.sockets[0].silent = true;
  document.dispatchEvent(new Event("visibilitychange"));
  await clock.run(11_200);
  assert.equal(client.state, "waiting");
  globalThis.dispatchEvent(new Event("online"));
  await clock.run(2100);
  assert.equal(client.state, "connected");
  client.close();
});

test("a page that goes into the back-forward cache closes its socket, and resumes when it is back", async () => {
  const { client, told } = make();
  client.connect();
  await clock.run(100);
  globalThis.dispatchEvent(new Event("pagehide"));
  await clock.run(100);
  assert.equal(client.state, "paused");
  assert.equal(clock.timers.size, 0);
  gateway.publish("user:1");
  globalThis.dispatchEvent(new Event("online"));
  await clock.run(100);
  assert.equal(gateway.sockets.length, 0);
  globalThis.dispatchEvent(new Event("pageshow"));
  await clock.run(100);
  assert.deepEqual(told.events, [1]);
  client.close();
});

test("an expiring connection is refreshed with a new token, and stays", async () => {
  let tokens = 0;
  let failing = 2;
  const { client } = make({
    auth: async () => {
      if (tokens && failing-- > 0) throw new Error("not now");
      return `short${++tokens}`;
    },
  });
  client.connect();
  await clock.run(100);
  gateway.actions = [];
  gateway.sockets[0].give({ event_type: "expiring", channel: "user:1", data: { expires_at: "…" } });
  await clock.run(5000);
  assert.deepEqual(
    gateway.actions.map(({ action, token }) => [action, token]),
    [["refresh", "short2"]],
  );
  assert.equal(gateway.asked.length, 1);
  client.close();
});

test("a reload goes on where the page was", async () => {
  const store = new Map();
  const storage = { getItem: (key) => store.get(key) ?? null, setItem: (key, value) => void store.set(key, value) };
  const first = make({ storage });
  first.client.subscribe("app:1");
  first.client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  await clock.run(100);
  first.client.close();
  gateway.publish("app:1");
  gateway.publish("app:2");
  await clock.run(100);
  const second = make({ storage });
  second.client.subscribe("app:1");
  second.client.subscribe("app:2");
  second.client.connect();
  await clock.run(100);
  gateway.publish("app:2");
  await clock.run(100);
  assert.deepEqual(second.told.events, [2, 4]);
  store.set("cluster-code", "{");
  assert.equal(make({ storage }).client.position, null);
  second.client.close();
});

test("what a handler throws stops neither the others nor the stream", async () => {
  const { client, told } = make();
  const errors = [];
  globalThis.reportError = (error) => errors.push(error.message);
  client.subscribe("app:1", () => {
    throw new Error("the app's");
  });
  client.connect();
  await clock.run(100);
  gateway.publish("app:1");
  gateway.publish("app:1");
  await clock.run(100);
  assert.deepEqual(
    [told.events, errors],
    [
      [1, 2],
      ["the app's", "the app's"],
    ],
  );
  client.close();
  delete globalThis.reportError;
});

test("closed by a handler in the middle of a batch, it handles the rest after it connects again", async () => {
  const { client, told } = make();
  client.connect();
  await clock.run(100);
  client.subscribe("user:1", ({ offset }) => offset === 2 && (client.close(), client.connect()));
  const [first, second, third] = [1, 2, 3].map((offset) => ({ event_type: "t", channel: "user:1", data: {}, offset }));
  gateway.log.push(first, second, third);
  gateway.sockets[0].onmessage({ data: JSON.stringify([first, second, third]) });
  await clock.run(1000);
  assert.deepEqual(told.events, [1, 2, 3]);
  assert.equal(gateway.most, 1);
  client.close();
});

test("the swap sends the main token, renews it once when it is refused, and tells what the gateway says", async () => {
  const requests = [];
  const answers = [
    Response.json({ detail: "The token has expired." }, { status: 401 }),
    Response.json({ short_token: "s", expires_in: 60 }),
    Response.json({ detail: "Wait." }, { status: 429, headers: { "Retry-After": "7" } }),
    Response.json({ detail: "The token was revoked." }, { status: 401 }),
  ];
  const fetched = globalThis.fetch;
  globalThis.fetch = async (url, options) => (
    requests.push([String(url), options.headers.Authorization, options.body]),
    answers.shift()
  );
  try {
    const auth = swap((refused) => (refused ? "new" : "old"), { url: "http://gateway", channels: ["session:1"] });
    const { signal } = new AbortController();
    assert.equal(await auth({ signal }), "s");
    assert.deepEqual(
      requests,
      ["old", "new"].map((token) => ["http://gateway/api/v1/auth", `Bearer ${token}`, '{"channels":["session:1"]}']),
    );
    await assert.rejects(auth({ signal }), { message: "Wait.", fatal: false, retryAfter: 7 });
    await assert.rejects(swap("fixed")({ signal }), { message: "The token was revoked.", fatal: true, code: 401 });
  } finally {
    globalThis.fetch = fetched;
  }
});

test("under random schedules there are never two sockets, and every event comes once, in order, or its loss is told", async () => {
  const base = Number(process.env.SEED ?? Math.floor(real.random() * 2 ** 32));
  console.log(`seed ${base}`);
  for (let round = 0; round < 60; round++) {
    const seed = (base + round) >>> 0;
    const draw = drawing(seed);
    Math.random = draw;
    clock = Object.assign(new Clock());
    gateway = new Gateway();
    globalThis.setTimeout = clock.set;
    globalThis.clearTimeout = clock.clear;
    gateway.latency = () => Math.floor(draw() * 40);
    gateway.batch = draw() < 0.5;
    const { client, told } = make({ auth: async () => (draw() < 0.1 ? Promise.reject(new Error("no")) : "short") });
    const perChannel = new Map();
    const note = (event) => perChannel.set(event.channel, [...(perChannel.get(event.channel) ?? []), event.offset]);
    const names = ["app:1", "app:2", "user:1"];
    for (const name of names) client.subscribe(name, note);
    let other = null;
    let replayed = [];
    const all = [];
    client.connect();
    await clock.run(200);
    while (client.state !== "connected") await clock.run(1000);
    const published = new Map(names.map((name) => [name, []]));
    const steps = [
      () => client.connect(),
      () => client.close(),
      () => (client.close(), client.connect()),
      () => globalThis.dispatchEvent(new Event("online")),
      () => document.dispatchEvent(new Event("visibilitychange")),
      () => document.dispatchEvent(new Event("resume")),
      () => globalThis.dispatchEvent(new Event("pagehide")),
      () => globalThis.dispatchEvent(new Event("pageshow")),
      () => gateway.sockets[0]?.drop(draw() < 0.5 ? 1006 : 4001),
      () => (gateway.refusing = !gateway.refusing),
      () => gateway.sockets[0] && (gateway.sockets[0].silent = true),
      () => {
        if (other) {
          other = void other();
          assert.deepEqual(replayed, all.slice(0, replayed.length), `seed ${seed}: app:3`);
        } else {
          replayed = [];
          other = client.subscribe("app:3", ({ offset }) => replayed.push(offset), { since: "e1:0" });
        }
      },
    ];
    for (let step = 0; step < 150; step++) {
      const name = names[Math.floor(draw() * names.length)];
      published.get(name).push(gateway.publish(name));
      all.push(gateway.publish("app:3"));
      if (draw() < 0.4) steps[Math.floor(draw() * steps.length)]();
      await clock.run(Math.floor(draw() ** 4 * 4000));
      const open = gateway.sockets.filter(({ readyState }) => readyState < 2).length;
      assert.ok(open <= 1, `seed ${seed}: ${open} sockets`);
    }
    gateway.refusing = false;
    globalThis.dispatchEvent(new Event("pageshow"));
    client.connect();
    await clock.run(120_000);
    assert.equal(client.state, "connected", `seed ${seed}`);
    assert.deepEqual(told.lost, [], `seed ${seed}`);
    for (const name of names) assert.deepEqual(perChannel.get(name), published.get(name), `seed ${seed}: ${name}`);
    if (other) assert.deepEqual(replayed, all, `seed ${seed}: app:3`);
    client.close();
    await clock.run(3000);
    assert.equal(clock.timers.size, 0, `seed ${seed}: timers are left`);
  }
});
