/**
 * An `auth` that swaps a main token at `POST /api/v1/auth`.
 * @param {string | ((refused?: string) => string | Promise<string>)} mainToken The token, or what gives one; that is
 *   asked again, with the token that was refused, so that it can be renewed.
 * @param {{ url?: string, channels?: string[] }} [options] `channels` narrows what the connection may subscribe to.
 * @returns {Auth}
 */
export function swap(mainToken: string | ((refused?: string) => string | Promise<string>), { url, channels }?: {
    url?: string;
    channels?: string[];
}): Auth;
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
    constructor(message: string, { code, fatal, channel, retryAfter, cause }?: {
        code?: number | string;
        fatal?: boolean;
        channel?: string;
        retryAfter?: number;
        cause?: unknown;
    });
    code: string | number | undefined;
    fatal: boolean;
    channel: string | undefined;
    retryAfter: number | undefined;
}
/** A client: any number of channels over one socket, from `connect()` to `close()`. */
export class ClusterCode {
    /** @param {Options} options */
    constructor(options: Options);
    get state(): State;
    /** Where the connection would resume: `{epoch}:{offset}`, null before the first `connected`. */
    get position(): string | null;
    get channels(): string[];
    /** Connect, and stay connected until `close()`. Does nothing when that is being done. */
    connect(): void;
    /** Disconnect. Subscriptions and position stay: `connect()` resumes. */
    close(): void;
    /**
     * Have `handler` called with every event of a channel.
     * @param {string} channel
     * @param {Handler} [handler]
     * @param {{ since?: string }} [options] `since`: replay the channel from there, when this is its first subscription.
     * @returns {() => void} Ends this subscription; the last one of a channel unsubscribes.
     */
    subscribe(channel: string, handler?: Handler, { since }?: {
        since?: string;
    }): () => void;
    /**
     * Show a state and keep it current: `load` it when the channel is attached, and again whenever events may have been
     * missed; events that come meanwhile are applied after it. A `load` that fails is tried again.
     * @param {string} channel
     * @param {(cancel: Cancel) => unknown} load GETs the state by REST, and shows it.
     * @param {Handler} apply
     * @returns {() => void} Ends it.
     */
    follow(channel: string, load: (cancel: Cancel) => unknown, apply: Handler): () => void;
    /**
     * Listen to `event` (of any channel), `state`, `subscribed`, `lost` (reload by REST what these channels tell of), and
     * `error`.
     * @template {keyof Notices} T
     * @param {T} type
     * @param {(notice: Notices[T]) => void} handler
     * @returns {() => void} Ends it.
     */
    on<T extends keyof Notices>(type: T, handler: (notice: Notices[T]) => void): () => void;
    #private;
}
/**
 * An event of the log.
 */
export type ClusterEvent = {
    event_type: string;
    channel: string;
    data: any;
    offset: number;
};
/**
 * How the data of all that the watch of a cluster tells begins.
 */
export type ClusterObject = {
    session_id: number | null;
    provider: string;
    namespace: string;
    change: "added" | "modified" | "deleted";
    uid: string;
    resource_version: string;
};
export type Container = {
    name: string;
    init: boolean;
    ready: boolean;
    state: "waiting" | "running" | "terminated" | "unknown";
    reason: string;
    message: string;
    restarts: number;
    exit_code: number | null;
};
/**
 * The data of `session.pod`.
 */
export type SessionPod = ClusterObject & {
    pod: string;
    phase: string;
    ready: boolean;
    node: string;
    reason: string;
    message: string;
    containers: Container[];
};
/**
 * The data of `session.event`.
 */
export type SessionEvent = ClusterObject & {
    type: string;
    reason: string;
    message: string;
    count: number;
    object: string;
    container: string;
    first_seen: string | null;
    last_seen: string | null;
};
/**
 * What it throws is reported, and the next event comes all the same.
 */
export type Handler = (event: ClusterEvent) => void;
/**
 * `waiting`: for the next attempt. `paused`: the page is hidden for good or in the back-forward cache. `stopped`: it
 * makes no sense to go on, and `error` says why; `connect()` tries again.
 */
export type State = "idle" | "connecting" | "connected" | "waiting" | "paused" | "stopped" | "closed";
/**
 * `delay`: milliseconds until the next attempt. `code`: how the last socket closed.
 */
export type StateChange = {
    state: State;
    delay?: number;
    code?: number;
    error?: ClusterCodeError;
};
/**
 * `recovered` false: what came before `position` may have been missed. Reload by REST.
 */
export type Subscribed = {
    channel: string;
    position: string;
    recovered: boolean;
};
/**
 * What `on` takes, and what its handlers get.
 */
export type Notices = {
    event: ClusterEvent;
    state: StateChange;
    subscribed: Subscribed;
    lost: {
        channels: string[];
        position: string;
    };
    error: ClusterCodeError;
};
export type Cancel = {
    signal: AbortSignal;
};
/**
 * A new short token. Throw a ClusterCodeError with `fatal: true` to
 * stop the client; anything else is tried again.
 */
export type Auth = (cancel: Cancel) => Promise<string>;
export type Store = {
    getItem(key: string): string | null;
    setItem(key: string, value: string): void;
};
export type Options = {
    auth: Auth;
    /**
     * The gateway; by default where the page comes from.
     */
    url?: string | undefined;
    /**
     * A position to begin at; by default now.
     */
    since?: string | undefined;
    /**
     * Keeps the position over reloads: `sessionStorage`, which each tab has for itself.
     */
    storage?: Store | undefined;
    storageKey?: string | undefined;
    /**
     * Where there is no global one.
     */
    WebSocket?: (new (url: string, protocols: string[]) => any) | undefined;
};
/**
 * A channel that the app wants. `settled`: the connection's position is its own; before, it goes on at `since`, or now.
 * `seen`: the offset up to which its events were handled. `id`: of the last time that it was asked for.
 */
export type Channel = {
    handlers: Set<Handler>;
    settled: boolean;
    since: string | null;
    seen: number;
    id: string;
};
