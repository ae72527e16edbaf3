// The page of live events: what cluster-code.js does, for people to see. The token is kept in memory only.
import { ClusterCode, ClusterCodeError, swap } from "/static/cluster-code.js";
import { describeEvent, describePod, Pods } from "/static/pods.js";

// Rows shown at most: a page that is left open must not grow for ever.
const MOST_ROWS = 500;
const WORDS = {
  idle: "not connected",
  connecting: "connecting …",
  connected: "connected",
  paused: "paused",
  stopped: "stopped",
  closed: "disconnected",
};

const element = (id) => document.getElementById(id);
const channels = new Map();
const pods = new Pods(element("pods"), element("pods-section"));
let client = null;
let tokens = null;
let events = 0;
let connections = 0;
let countdown;

async function call(method, path, body, signal) {
  const answer = await fetch(`/api/v1${path}`, {
    method,
    headers: {
      ...(tokens && { Authorization: `Bearer ${tokens.access_token}` }),
      ...(body && { "Content-Type": "application/json" }),
    },
    body: body && JSON.stringify(body),
    signal,
  });
  const content = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok)
    throw new ClusterCodeError(content?.detail ?? `The gateway answers ${answer.status}.`, { code: answer.status });
  return content;
}

/** The main token; a new one when that one was refused and the sign-in can be renewed. */
async function mainToken(refused) {
  if (refused === tokens.access_token && tokens.refresh_token) {
    tokens = await call("POST", "/auth/refresh", { refresh_token: tokens.refresh_token });
  }
  return tokens.access_token;
}

function complain(error) {
  element("notice").textContent = error ? error.message : "";
  element("notice").hidden = !error;
}

async function enter(getTokens) {
  complain(null);
  try {
    tokens = await getTokens();
    const me = await call("GET", "/users/me");
    begin(me);
  } catch (error) {
    tokens = null;
    complain(error);
  }
}

function begin(me) {
  element("sign-in").hidden = true;
  element("live").hidden = element("leave").hidden = false;
  for (const form of document.querySelectorAll("#sign-in form")) form.reset();
  client = new ClusterCode({ auth: swap(mainToken) });
  client.on("state", showState);
  client.on("event", showEvent);
  client.on("subscribed", ({ channel, recovered }) => {
    const list = channels.get(channel)?.item.classList;
    // After a cut all are subscribed to again: that is no news.
    if (list?.contains("asked") && recovered) say(`subscribed to ${channel}`);
    list?.remove("asked");
  });
  client.on("lost", ({ channels: names, position }) => {
    // Those of sessions are loaded again.
    if (names.includes("cluster")) pods.forget("cluster");
    say(
      `Some events of ${names.join(", ")} are gone: what is shown goes on after ${position}. An app reloads its state now.`,
      "lost",
    );
  });
  client.on("error", (error) => {
    if (error.channel && !client.channels.includes(error.channel)) forget(error.channel);
    complain(error);
  });
  add(`user:${me.id}`, true);
  add("broadcast");
  client.connect();
  suggest(me).catch(complain);
}

/** What can be watched. */
async function suggest(me) {
  const names = me.is_admin ? ["cluster"] : [];
  const [sessions, workspaces] = await Promise.all([call("GET", "/sessions"), call("GET", "/workspaces")]);
  names.push(
    ...sessions.items.map(({ id }) => `session:${id}`),
    ...workspaces.items.map(({ id }) => `workspace:${id}`),
  );
  element("known").replaceChildren(
    ...names.map((name) => Object.assign(document.createElement("option"), { value: name })),
  );
}

function add(name, own = false) {
  if (channels.has(name)) return;
  const item = document.createElement("li");
  item.className = "asked";
  item.append(Object.assign(document.createElement("span"), { textContent: name }));
  const session = name.match(/^session:(\d+)$/)?.[1];
  const end = session ? followPods(name, session) : client.subscribe(name);
  channels.set(name, { item, end });
  if (!own) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    button.setAttribute("aria-label", `Leave ${name}`);
    button.addEventListener("click", () => forget(name));
    item.append(button);
  }
  element("channels").append(item);
}

/** The pods of a session, as they are and as they become. */
function followPods(channel, session) {
  return client.follow(
    channel,
    async ({ signal }) => {
      const { items } = await call("GET", `/sessions/${session}/pods`, undefined, signal);
      pods.replace(channel, items);
    },
    (event) => pods.take(event),
  );
}

function forget(name) {
  const { item, end } = channels.get(name) ?? {};
  channels.delete(name);
  pods.forget(name);
  end?.();
  item?.remove();
}

function showState({ state, delay, code, error }) {
  clearInterval(countdown);
  const output = element("state");
  output.dataset.state = state;
  output.textContent = WORDS[state];
  element("cut").textContent = state === "closed" || state === "stopped" ? "Connect" : "Disconnect";
  if (state === "connected") {
    complain(null);
    say(connections++ ? `connected again, resuming after ${client.position}` : `connected, at ${client.position}`);
    element("reconnects").textContent = connections - 1;
  } else if (state === "waiting") {
    if (delay === undefined) return;
    say(`connection lost${code ? ` (${code})` : ""}, trying again in ${(delay / 1000).toFixed(1)} s`);
    const until = Date.now() + delay;
    const show = () =>
      (output.textContent = `reconnecting in ${Math.max(0, (until - Date.now()) / 1000).toFixed(1)} s`);
    countdown = setInterval(show, 200);
    show();
  } else if (state === "stopped") say(error?.message ?? "stopped", "lost");
  if (client.position) element("position").textContent = client.position;
}

function cell(text) {
  return Object.assign(document.createElement("td"), { textContent: text });
}

function put(row) {
  const body = element("events");
  body.prepend(row);
  while (body.rows.length > MOST_ROWS) body.lastElementChild.remove();
  element("empty").hidden = true;
}

function say(text, kind = "") {
  const row = document.createElement("tr");
  row.className = `said ${kind}`;
  row.append(cell(`${new Date().toLocaleTimeString()}  ${text}`));
  row.firstChild.colSpan = 4;
  put(row);
}

function showEvent({ offset, event_type, channel, data }) {
  const row = document.createElement("tr");
  row.className = "event";
  row.dataset.offset = offset;
  const shown = cell("");
  if (event_type === "session.status") {
    shown.dataset.status = data.status;
    shown.append(
      Object.assign(document.createElement("b"), { textContent: data.status }),
      ` ${data.message || data.reason || ""}`,
    );
  } else if (event_type === "session.event" && data.type) {
    shown.dataset.status = data.type;
    shown.append(
      Object.assign(document.createElement("b"), { textContent: data.reason }),
      ` ${describeEvent(data)}`,
    );
  } else if (event_type === "session.pod" && Array.isArray(data.containers)) shown.textContent = describePod(data);
  else shown.textContent = event_type === "session.log" ? data.line : JSON.stringify(data);
  // Those of sessions are taken when what was before is known: see `followPods`.
  if (channel === "cluster") pods.take({ event_type, channel, data });
  shown.title = JSON.stringify(data, null, 1);
  row.append(cell(offset), cell(event_type), cell(channel), shown);
  put(row);
  element("count").textContent = ++events;
  element("position").textContent = `${client.position.split(":")[0]}:${offset}`;
}

function onSubmit(id, work) {
  element(id).addEventListener("submit", (event) => {
    event.preventDefault();
    work(Object.fromEntries(new FormData(event.target)), event.target);
  });
}

onSubmit("login", ({ email, password }) => enter(() => call("POST", "/auth/login", { email, password })));
onSubmit("paste", ({ token }) => enter(async () => ({ access_token: token.trim() })));
onSubmit("add", ({ channel }, form) => {
  complain(null);
  add(channel.trim());
  form.reset();
});
element("cut").addEventListener("click", () =>
  client.state === "closed" || client.state === "stopped" ? client.connect() : client.close(),
);
element("clear").addEventListener("click", () => {
  element("events").replaceChildren();
  element("empty").hidden = false;
});
element("leave").addEventListener("click", async () => {
  client.close();
  const { refresh_token } = tokens;
  if (refresh_token) await call("POST", "/auth/logout", { refresh_token }).catch(() => {});
  location.reload();
});
