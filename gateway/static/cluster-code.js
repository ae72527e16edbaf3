/**
 * The client of a Cluster Code gateway: one WebSocket, every event once and in order, through every cut.
 *
 *     const client = new ClusterCode({ url: "https://code.example.org", auth: swap(mainToken) });
 *     client.subscribe("session:42", (event) => console.log(event.event_type, event.data));
 *     client.connect();
 *
 * It speaks what docs/protocol.md says. No dependency; browsers, workers, and Node with a WebSocket.
 * @module
 */

/**
 * @typedef {{ event_type: string, channel: string, data: any, offset: number }} ClusterEvent An event of the log.
 * @typedef {{ session_id: number | null, provider: string, namespace: string, change: "added" | "modified" | "deleted",
 *   uid: string, resource_version: string }} ClusterObject How the data of all that the watch of a cluster tells begins.
 * @typedef {{ name: string, init: boolean, ready: boolean, state: "waiting" | "running" | "terminated" | "unknown",
 *   reason: string, message: string, restarts: number, exit_code: number | null }} Container
 * @typedef {ClusterObject & { pod: string, phase: string, ready: boolean, node: string, reason: string, message: string,
 *   containers: Container[] }} SessionPod The data of `session.pod`.
 * @typedef {ClusterObject & { type: string, reason: string, message: string, count: number, object: string,
 *   container: string, first_seen: string | null, last_seen: string | null }} SessionEvent The data of `session.event`.
 * @typedef {(event: ClusterEvent) => void} Handler What it throws is reported, and the next event comes all the same.
 * @typedef {"idle" | "connecting" | "connected" | "waiting" | "paused" | "stopped" | "closed"} State
 *   `waiting`: for the next attempt. `paused`: the page is hidden for good or in the back-forward cache. `stopped`: it
 *   makes no sense to go on, and `error` says why; `connect()` tries again.
 * @typedef {{ state: State, delay?: number, code?: number, error?: ClusterCodeError }} StateChange
 *   `delay`: milliseconds until the next attempt. `code`: how the last socket closed.
 * @typedef {{ channel: string, position: string, recovered: boolean }} Subscribed
 *   `recovered` false: what came before `position` may have been missed. Reload by REST.
 * @typedef {{ event: ClusterEvent, state: StateChange, subscribed: Subscribed, lost: { channels: string[], position:
 *   string }, error: ClusterCodeError }} Notices What `on` takes, and what its handlers get.
 * @typedef {{ signal: AbortSignal }} Cancel
 * @typedef {(cancel: Cancel) => Promise<string>} Auth A new short token. Throw a ClusterCodeError with `fatal: true` to
 *   stop the client; anything else is tried again.
 * @typedef {{ getItem(key: string): string | null, setItem(key: string, value: string): void }} Store
 * @typedef {object} Options
 * @property {Auth} auth
 * @property {string} [url] The gateway; by default where the page comes from.
 * @property {string} [since] A position to begin at; by default now.
 * @property {Store} [storage] Keeps the position over reloads: `sessionStorage`, which each tab has for itself.
 * @property {string} [storageKey]
 * @property {new (url: string, protocols: string[]) => any} [WebSocket] Where there is no global one.
 */

/** What went wrong, as a sentence. */
export class ClusterCodeError extends Error {
  /**
   * @param {string} message
   * @param {{ code?: number | string, fatal?: boolean, channel?: string, retryAfter?: number, cause?: unknown }}
   *   [details] `code`: a close code, an HTTP status, or the `code` of an `error`. `fatal`: trying again is no use.
   *   `retryAfter`: seconds.
   */
  constructor(message, { code, fatal = false, channel, retryAfter, cause } = {}) {
    super(message, { cause });
    this.name = "ClusterCodeError";
    this.code = code;
    this.fatal = fatal;
    this.channel = channel;
    this.retryAfter = retryAfter;
  }
}

/**
 * An `auth` that swaps a main token at `POST /api/v1/auth`.
 * @param {string | ((refused?: string) => string | Promise<string>)} mainToken The token, or what gives one; that is
 *   asked again, with the token that was refused, so that it can be renewed.
 * @param {{ url?: string, channels?: string[] }} [options] `channels` narrows what the connection may subscribe to.
 * @returns {Auth}
 */
export function swap(mainToken, { url = origin(), channels } = {}) {
  const give = typeof mainToken === "function" ? mainToken : () => mainToken;
  /** @param {string} token @param {AbortSignal} signal */
  const post = (token, signal) =>
    fetch(new URL("/api/v1/auth", url), {
      method: "POST",
      headers: { Authorization: `Bearer ${token}`, ...(channels && { "Content-Type": "application/json" }) },
      body: channels && JSON.stringify({ channels }),
      cache: "no-store",
      signal,
    });
  return async ({ signal }) => {
    const token = await give();
    let answer = await post(token, signal);
    if (answer.status === 401) {
      const renewed = await give(token);
      if (renewed && renewed !== token) answer = await post(renewed, signal);
    }
    if (answer.ok) return (await answer.json()).short_token;
    const problem = await answer.json().catch(() => ({}));
    throw new ClusterCodeError(problem.detail ?? `The gateway answers ${answer.status} to the swap of the token.`, {
      code: answer.status,
      fatal: answer.status < 500 && ![408, 425, 429].includes(answer.status),
      retryAfter: Number(answer.headers.get("Retry-After")) || undefined,
    });
  };
}

const REASONS = new Map([
  [4500, "The token is not valid any more: sign in again."],
  [4501, "The gateway could not read what this client sent."],
  [4503, "An administrator has disconnected this client."],
  [4504, "There are too many connections of this user."],
  [4505, "There are too many channels for one connection."],
  [4507, "The permission for one of the channels was withdrawn."],
]);
// Milliseconds: for an answer, for a handshake, for a socket to close, and for a connection to count as a stable one.
const ANSWER = 10_000;
const HANDSHAKE = 20_000;
const FAREWELL = 2_000;
const STABLE = 10_000;
const CLOSED = 3;
// Servers take request lines of 8 KiB; channels beyond that are subscribed to by actions.
const LONGEST_QUERY = 4_000;

/** @param {number} failures In a row. @returns {number} Milliseconds, with full jitter. */
const backoff = (failures) => Math.random() * Math.min(20_000, 500 * 2 ** Math.min(failures, 10));
/** @param {string} position */
const offsetOf = (position) => Number(position.slice(position.lastIndexOf(":") + 1));
const now = () => performance.now();
/** @returns {string} */
const origin = () => globalThis.location?.origin ?? "http://127.0.0.1:8080";

/** @param {unknown} cause @param {string} message Said of what has no sentence of its own. @param {boolean} [fatal] */
const asError = (cause, message, fatal = false) =>
  cause instanceof ClusterCodeError ? cause : new ClusterCodeError(message, { cause, fatal });

/** What a handler of the app throws is the app's to see, and stops nothing here. @param {unknown} error */
const report = (error) => ("reportError" in globalThis ? reportError(error) : console.error(error));

/**
 * A channel that the app wants. `settled`: the connection's position is its own; before, it goes on at `since`, or now.
 * `seen`: the offset up to which its events were handled. `id`: of the last time that it was asked for.
 * @typedef {{ handlers: Set<Handler>, settled: boolean, since: string | null, seen: number, id: string }} Channel
 */

/** One attempt to connect, and the connection that comes of it. All that belongs to it ends with it. */
class Attempt {
  controller = new AbortController();
  /** @type {Set<ReturnType<typeof setTimeout>>} */
  timers = new Set();
  /** @type {any} */
  socket = null;
  /** The channels that its URL names. @type {Map<string, Channel>} */
  asked = new Map();
  /** When `connected` came; 0 before. */
  since = 0;
  heard = 0;
  /** The question that nothing has answered yet. @type {object | null} */
  probe = null;
  /** Milliseconds of silence after which the gateway is asked whether it is there. */
  interval = 25_000;
  /** The user's own channel, which every connection has. */
  own = "";
  /** Channels whose end was asked for, each with the id of that: what still comes is of the time before.
   * @type {Map<string, string>} */
  leaving = new Map();

  /** @param {() => void} work @param {number} delay */
  later(work, delay) {
    const timer = setTimeout(() => (this.timers.delete(timer), work()), delay);
    this.timers.add(timer);
  }

  /** @param {object} action */
  send(action) {
    if (this.socket.readyState === 1) this.socket.send(JSON.stringify(action));
  }

  end() {
    this.controller.abort();
    for (const timer of this.timers) clearTimeout(timer);
    this.timers.clear();
  }
}

/** A client: any number of channels over one socket, from `connect()` to `close()`. */
export class ClusterCode {
  /** @type {Options & { url: string, storageKey: string }} */ #options;
  /** @type {Map<string, Channel>} */ #channels = new Map();
  /** @type {Map<string, Set<(notice: any) => void>>} */ #listeners = new Map();
  /** @type {State} */ #state = "idle";
  /** @type {string | null} */ #position;
  /** Where channels of before a reload go on. @type {Record<string, string>} */ #kept = {};
  #connectedOnce = false;
  #wanted = false;
  #paused = false;
  /** Attempts that failed in a row, and handshakes that were refused in a row. */
  #failures = 0;
  #refusals = 0;
  #ids = 0;
  /** @type {Attempt | null} */ #attempt = null;
  /** A socket that is still closing: there are never two. @type {any} */ #closing = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #farewell;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #wait;

  /** @param {Options} options */
  constructor(options) {
    const { since = null, storage, url = origin(), storageKey = "cluster-code" } = options;
    this.#options = { ...options, url, storageKey };
    this.#position = since;
    try {
      const kept = JSON.parse(storage?.getItem(storageKey) ?? "null");
      if (kept?.position && !since) [this.#position, this.#kept] = [kept.position, kept.channels ?? {}];
    } catch {
      // Nothing of ours, or nothing that may be read: begin now.
    }
  }

  get state() {
    return this.#state;
  }

  /** Where the connection would resume: `{epoch}:{offset}`, null before the first `connected`. */
  get position() {
    return this.#position;
  }

  get channels() {
    return [...this.#channels.keys()];
  }

  /** Connect, and stay connected until `close()`. Does nothing when that is being done. */
  connect() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#paused = false;
    this.#failures = 0;
    this.#watchPage(true);
    this.#go();
  }

  /** Disconnect. Subscriptions and position stay: `connect()` resumes. */
  close() {
    this.#halt("closed");
  }

  /**
   * Have `handler` called with every event of a channel.
   * @param {string} channel
   * @param {Handler} [handler]
   * @param {{ since?: string }} [options] `since`: replay the channel from there, when this is its first subscription.
   * @returns {() => void} Ends this subscription; the last one of a channel unsubscribes.
   */
  subscribe(channel, handler = () => {}, { since } = {}) {
    const entry = this.#channels.get(channel) ?? this.#want(channel, since);
    /** @type {Handler} */
    const own = (event) => handler(event);
    entry.handlers.add(own);
    return () => {
      if (!entry.handlers.delete(own) || entry.handlers.size || this.#channels.get(channel) !== entry) return;
      this.#channels.delete(channel);
      this.#keep();
      if (this.#attempt?.since) this.#unsubscribe(this.#attempt, channel);
    };
  }

  /**
   * Show a state and keep it current: `load` it when the channel is attached, and again whenever events may have been
   * missed; events that come meanwhile are applied after it. A `load` that fails is tried again.
   * @param {string} channel
   * @param {(cancel: Cancel) => unknown} load GETs the state by REST, and shows it.
   * @param {Handler} apply
   * @returns {() => void} Ends it.
   */
  follow(channel, load, apply) {
    /** @type {ClusterEvent[] | null} */
    let waiting = [];
    let failures = 0;
    let controller = new AbortController();
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const stop = () => (controller.abort(), clearTimeout(timer));
    const reload = async () => {
      stop();
      const { signal } = (controller = new AbortController());
      waiting ??= [];
      try {
        await load({ signal });
      } catch (cause) {
        if (signal.aborted) return;
        timer = setTimeout(reload, backoff(failures++));
        return this.#fail(new ClusterCodeError(`The state of ${channel} could not be loaded.`, { channel, cause }));
      }
      if (signal.aborted) return;
      failures = 0;
      const late = waiting ?? [];
      waiting = null;
      for (const event of late) this.#call(apply, event);
    };
    const ends = [
      stop,
      this.on("state", ({ state }) => void ((state === "closed" || state === "stopped") && stop())),
      this.on("subscribed", ({ channel: to, recovered }) => {
        if (to !== channel) return;
        if (!recovered) waiting = [];
        if (waiting) void reload();
      }),
      this.subscribe(channel, (event) => void (waiting ? waiting.push(event) : apply(event))),
    ];
    if (this.#attempt?.since && this.#channels.get(channel)?.settled) void reload();
    return () => ends.forEach((end) => end());
  }

  /**
   * Listen to `event` (of any channel), `state`, `subscribed`, `lost` (reload by REST what these channels tell of), and
   * `error`.
   * @template {keyof Notices} T
   * @param {T} type
   * @param {(notice: Notices[T]) => void} handler
   * @returns {() => void} Ends it.
   */
  on(type, handler) {
    /** @param {Notices[T]} notice */
    const own = (notice) => handler(notice);
    const handlers = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, handlers.add(own));
    return () => void handlers.delete(own);
  }

  /** @param {string} channel @param {string | undefined} given @returns {Channel} */
  #want(channel, given) {
    const begin = this.#connectedOnce ? undefined : this.#options.since;
    const since = given ?? this.#kept[channel] ?? begin ?? null;
    delete this.#kept[channel];
    const entry = { handlers: new Set(), settled: false, since, seen: since ? offsetOf(since) : 0, id: "" };
    this.#channels.set(channel, entry);
    const attempt = this.#attempt;
    // Before `connected` nothing can be asked for; it then asks for all that is wanted by that time.
    if (attempt?.since && channel === attempt.own && !since) {
      Object.assign(entry, { settled: true, seen: offsetOf(this.#position ?? ":0") });
    } else if (attempt?.since) this.#ask(attempt, channel, entry);
    return entry;
  }

  /** @param {Attempt} attempt @param {string} channel @param {Channel} entry */
  #ask(attempt, channel, entry) {
    entry.id = String(++this.#ids);
    attempt.send({ action: "subscribe", channel, id: entry.id, ...(entry.since && { since: entry.since }) });
  }

  /** @param {Attempt} attempt @param {string} channel */
  #unsubscribe(attempt, channel) {
    if (channel === attempt.own) return;
    const id = String(++this.#ids);
    attempt.leaving.set(channel, id);
    attempt.send({ action: "unsubscribe", channel, id });
  }

  /** Begin an attempt, when one is wanted and nothing of the last one is left. */
  #go() {
    if (!this.#wanted || this.#paused || this.#attempt || this.#closing || this.#wait !== undefined) return;
    const attempt = (this.#attempt = new Attempt());
    attempt.later(() => this.#end(attempt), HANDSHAKE);
    // An `auth` that throws at once is one that fails.
    new Promise((resolve) => resolve(this.#options.auth({ signal: attempt.controller.signal }))).then(
      (token) => this.#attempt === attempt && this.#open(attempt, String(token)),
      (cause) =>
        this.#attempt === attempt &&
        this.#denied(
          attempt,
          asError(cause, "No short token could be had: the gateway cannot be reached, or `auth` failed."),
        ),
    );
    this.#tell("connecting");
  }

  /** @param {Attempt} attempt @param {ClusterCodeError} error */
  #denied(attempt, error) {
    if (error.fatal) return this.#halt("stopped", { error });
    this.#end(attempt, undefined, (error.retryAfter ?? 0) * 1000);
    this.#fail(error);
  }

  /** @param {Attempt} attempt @param {string} token */
  #open(attempt, token) {
    const url = new URL("/ws?batch=1", this.#options.url);
    url.protocol = url.protocol.replace("http", "ws");
    if (this.#position) url.searchParams.set("since", this.#position);
    const along = [...this.#channels].filter(([, { settled, since }]) => settled || since === this.#position);
    const names = along.map(([name]) => name).join();
    // One channel that is refused has the whole handshake refused, and browsers do not say why: now and then they are
    // asked for one by one, after it. That keeps the order of each channel, and not the order across them.
    if (names && names.length <= LONGEST_QUERY && this.#refusals % 3 !== 2) {
      url.searchParams.set("channels", names);
      attempt.asked = new Map(along);
    }
    try {
      attempt.socket = new (this.#options.WebSocket ?? WebSocket)(url.href, ["cluster-code.v1", `bearer.${token}`]);
    } catch (cause) {
      return this.#halt("stopped", { error: asError(cause, "The socket cannot be opened: look at the URL.", true) });
    }
    attempt.socket.onmessage = (/** @type {{ data: any }} */ { data }) => this.#receive(attempt, data);
    attempt.socket.onclose = (/** @type {{ code: number }} */ { code }) => this.#end(attempt, code);
    // An error event says nothing, and a close event follows it.
    attempt.socket.onerror = () => {};
  }

  /** @param {Attempt} attempt @param {any} frame An object, or an array of them. */
  #receive(attempt, frame) {
    attempt.heard = now();
    attempt.probe = null;
    let messages;
    try {
      messages = [JSON.parse(frame)].flat();
    } catch (cause) {
      this.#end(attempt);
      return this.#fail(new ClusterCodeError("The gateway sent what is no JSON.", { cause }));
    }
    for (const message of messages) {
      // A handler may have closed it: what is left comes again.
      if (this.#attempt !== attempt) break;
      if ("offset" in message) this.#take(attempt, message);
      else this.#obey(attempt, message);
    }
    this.#keep();
  }

  /** @param {Attempt} attempt @param {ClusterEvent} event */
  #take(attempt, event) {
    const { channel, offset } = event;
    const entry = this.#channels.get(channel);
    const settled = entry ? entry.settled : channel === attempt.own;
    const position = this.#position ?? ":0";
    // Not wanted any more, or not wanted yet, or handled already.
    if (attempt.leaving.has(channel) || !(settled || entry?.since)) return;
    if (offset > (entry?.seen ?? offsetOf(position))) {
      for (const handler of [...(entry?.handlers ?? [])]) this.#call(handler, event);
      this.#emit("event", event);
    }
    const reached = `${position.slice(0, position.lastIndexOf(":"))}:${offset}`;
    if (entry) entry.seen = Math.max(entry.seen, offset);
    // Replayed events do not move the connection's position.
    if (entry && !settled) entry.since = reached;
    else if (offset > offsetOf(position)) this.#position = reached;
  }

  /** What is said to this connection alone. @param {Attempt} attempt @param {any} message */
  #obey(attempt, { event_type, channel, data }) {
    const entry = this.#channels.get(channel);
    if (event_type === "connected") this.#connected(attempt, channel, data);
    else if (event_type === "expiring") void this.#refresh(attempt, 0);
    else if (event_type === "unsubscribed" && attempt.leaving.get(channel) === data.id) attempt.leaving.delete(channel);
    else if (event_type === "subscribed" && entry && entry.id === data.id) {
      Object.assign(entry, { settled: true, since: null, seen: offsetOf(data.position) });
      this.#attached([channel], data.position, data.recovered);
    } else if (event_type === "error") {
      if (entry && entry.id === data.id && data.temporary) {
        attempt.later(() => this.#channels.get(channel) === entry && this.#ask(attempt, channel, entry), 1000);
      } else if (entry && entry.id === data.id) this.#channels.delete(channel);
      else if (data.id === "refresh" && data.temporary) attempt.later(() => void this.#refresh(attempt, 1), 1000);
      this.#fail(new ClusterCodeError(data.message, { code: data.code, channel }));
    }
  }

  /** @param {Attempt} attempt @param {string} own @param {any} data */
  #connected(attempt, own, data) {
    const before = this.#position;
    attempt.end();
    attempt.controller = new AbortController();
    Object.assign(attempt, { since: now(), own, interval: data.ping_interval * 1000 });
    attempt.later(() => this.#listen(attempt), attempt.interval);
    this.#connectedOnce = true;
    this.#refusals = 0;
    this.#position = data.position;
    for (const [name, entry] of attempt.asked) {
      // Left meanwhile, and perhaps taken again.
      if (this.#channels.get(name) !== entry) this.#unsubscribe(attempt, name);
    }
    for (const [name, entry] of this.#channels) {
      if (attempt.asked.get(name) === entry) {
        const seen = Math.max(data.recovered ? entry.seen : 0, offsetOf(data.position));
        Object.assign(entry, { settled: true, since: null, seen });
      } else {
        Object.assign(entry, entry.settled && { settled: false, since: before });
        this.#ask(attempt, name, entry);
      }
    }
    this.#tell("connected");
    const attached = [...attempt.asked.keys()].filter((name) => name !== own && this.#channels.get(name)?.settled);
    this.#attached([own, ...attached], data.position, data.recovered);
  }

  /** @param {string[]} channels @param {string} position @param {boolean} recovered */
  #attached(channels, position, recovered) {
    if (!recovered) this.#emit("lost", { channels, position });
    for (const channel of channels) this.#emit("subscribed", { channel, position, recovered });
  }

  /** @param {Attempt} attempt @param {number} failures */
  async #refresh(attempt, failures) {
    try {
      const token = await this.#options.auth({ signal: attempt.controller.signal });
      if (this.#attempt === attempt) attempt.send({ action: "refresh", token, id: "refresh" });
    } catch (cause) {
      if (this.#attempt !== attempt) return;
      const error = asError(cause, "No short token could be had to go on with.");
      const delay = Math.max(backoff(failures), (error.retryAfter ?? 0) * 1000);
      if (!error.fatal) attempt.later(() => void this.#refresh(attempt, failures + 1), delay);
      this.#fail(error);
    }
  }

  /** Ask the gateway whether it is there once nothing has come for long: its pings are hidden from scripts.
   * @param {Attempt} attempt */
  #listen(attempt) {
    const silence = now() - attempt.heard;
    if (silence >= attempt.interval) this.#probe(attempt);
    attempt.later(() => this.#listen(attempt), Math.max(attempt.interval - silence, ANSWER));
  }

  /** @param {Attempt} attempt */
  #probe(attempt) {
    if (attempt.probe) return;
    const probe = (attempt.probe = {});
    attempt.send({ action: "ping" });
    const lost = () => attempt.probe === probe && this.#end(attempt);
    // In two steps: in a page that was frozen the timer comes before the answer that waits already.
    attempt.later(() => attempt.later(lost, 1000), ANSWER);
  }

  /** The attempt is over. @param {Attempt} attempt @param {number} [code] @param {number} [atLeast] Milliseconds. */
  #end(attempt, code, atLeast = 0) {
    if (this.#attempt !== attempt) return;
    if (code && code >= 4500 && code < 5000) {
      const reason = REASONS.get(code) ?? `The gateway has closed the connection for good (${code}).`;
      return this.#halt("stopped", { code, error: new ClusterCodeError(reason, { code, fatal: true }) });
    }
    if (attempt.since && now() - attempt.since >= STABLE) this.#failures = 0;
    if (attempt.socket && !attempt.since) this.#refusals++;
    const delay = Math.max(backoff(this.#failures++), atLeast);
    this.#leave();
    this.#wait = setTimeout(() => this.#again(), delay);
    this.#tell("waiting", { delay, code });
  }

  #again() {
    clearTimeout(this.#wait);
    this.#wait = undefined;
    this.#go();
  }

  /** Give the attempt up. The next one begins when its socket has closed, or has had the time to. */
  #leave() {
    const attempt = this.#attempt;
    this.#attempt = null;
    attempt?.end();
    const socket = attempt?.socket;
    if (!socket || socket.readyState === CLOSED) return;
    const gone = () => {
      if (this.#closing !== socket) return;
      clearTimeout(this.#farewell);
      this.#closing = null;
      this.#go();
    };
    this.#closing = socket;
    this.#farewell = setTimeout(gone, FAREWELL);
    socket.onmessage = null;
    socket.onclose = gone;
    socket.close();
  }

  /** @param {State} state @param {{ code?: number, error?: ClusterCodeError }} [why] */
  #halt(state, why = {}) {
    this.#wanted = false;
    clearTimeout(this.#wait);
    this.#wait = undefined;
    this.#watchPage(false);
    this.#leave();
    if (this.#state !== state) this.#tell(state, why);
    if (why.error) this.#fail(why.error);
  }

  /** @param {boolean} watch */
  #watchPage(watch) {
    const verb = watch ? "addEventListener" : "removeEventListener";
    for (const type of ["online", "pageshow", "pagehide"]) globalThis[verb]?.(type, this.#onPage);
    for (const type of ["visibilitychange", "resume"]) globalThis.document?.[verb](type, this.#onPage);
  }

  #onPage = (/** @type {Event} */ { type }) => {
    if (type === "pagehide") {
      // A page with an open socket may not enter the back-forward cache.
      this.#paused = true;
      clearTimeout(this.#wait);
      this.#wait = undefined;
      this.#leave();
      return this.#tell("paused");
    }
    if (type === "pageshow") this.#paused = false;
    if (type === "visibilitychange" && document.visibilityState === "hidden") return;
    // Timers may have stood still: look at once whether the connection lives, and do not wait for the next attempt.
    if (this.#attempt?.since) this.#probe(this.#attempt);
    else this.#again();
  };

  #keep() {
    const { storage, storageKey } = this.#options;
    if (!storage) return;
    const channels = { ...this.#kept };
    for (const [name, { settled, since }] of this.#channels) {
      if (settled || since) channels[name] = settled ? (this.#position ?? "") : (since ?? "");
    }
    try {
      storage.setItem(storageKey, JSON.stringify({ position: this.#position, channels }));
    } catch (cause) {
      this.#fail(new ClusterCodeError("The position cannot be kept in the storage.", { cause }));
    }
  }

  /** @param {State} state @param {object} [details] */
  #tell(state, details = {}) {
    this.#state = state;
    this.#emit("state", { state, ...details });
  }

  /** @param {ClusterCodeError} error */
  #fail(error) {
    if (!this.#listeners.get("error")?.size) console.warn(`cluster-code: ${error.message}`);
    this.#emit("error", error);
  }

  /** @template {keyof Notices} T @param {T} type @param {Notices[T]} notice */
  #emit(type, notice) {
    for (const handler of [...(this.#listeners.get(type) ?? [])]) this.#call(handler, notice);
  }

  /** @param {(notice: any) => void} handler @param {any} notice */
  #call(handler, notice) {
    try {
      handler(notice);
    } catch (error) {
      report(error);
    }
  }
}
