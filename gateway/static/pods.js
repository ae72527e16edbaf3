// The pods of sessions on Kubernetes, as `session.pod` and `session.event` tell of them: a list that stays current.

// Pods shown at most: administrators hear of all that there are.
const MOST_PODS = 100;
// Reasons of containers that wait, and that nobody needs to look into.
const ON_THE_WAY = new Set(["", "ContainerCreating", "PodInitializing"]);
const SIGNS = { added: "+", modified: "~", deleted: "−" };

const times = (number, one, many) => `${number} ${number === 1 ? one : many}`;

/** How a container is: `good`, `busy` or `bad`. */
function toneOf({ init, ready, state, reason, exit_code: code }) {
  if (ready || (init && state === "terminated" && code === 0)) return "good";
  return state === "running" || (state !== "terminated" && ON_THE_WAY.has(reason)) ? "busy" : "bad";
}

/** What a container does, in a few words. */
function describeContainer({ ready, state, reason, restarts, exit_code: code }) {
  const words = [ready ? "ready" : state === "waiting" && reason ? reason : [state, reason].filter(Boolean).join(": ")];
  if (!ready && code) words.push(`exit code ${code}`);
  if (restarts) words.push(times(restarts, "restart", "restarts"));
  return words.join(", ");
}

/** A pod in one line. */
export function describePod({ change, pod, phase, reason, message, containers }) {
  const head = [SIGNS[change] ?? "~", pod, phase, reason, message].filter(Boolean).join(" ");
  return [head, ...containers.map((one) => `${one.name}: ${describeContainer(one)}`)].join(" · ");
}

/** What Kubernetes says of something, in one line, without the reason. */
export function describeEvent({ object, container, count, message }) {
  return `${object}${container ? ` [${container}]` : ""}${count > 1 ? ` (${count} times)` : ""} ${message}`;
}

function node(name, className, textContent) {
  return Object.assign(document.createElement(name), { className, textContent });
}

/** The list. A pod is known by its uid, and of two versions the higher one is shown. */
export class Pods {
  #list;
  #section;
  /** By uid: what is shown, through which channels it came, and what Kubernetes has warned of last. */
  #shown = new Map();

  constructor(list, section) {
    this.#list = list;
    this.#section = section;
  }

  /** Show all that a channel's session has now. */
  replace(channel, pods) {
    this.forget(channel);
    for (const pod of pods) this.#put(channel, pod);
    this.#tidy();
  }

  /** Take an event of a channel. */
  take({ event_type: type, channel, data }) {
    if (type === "session.event" && data.type === "Warning") this.#warn(data);
    if (type !== "session.pod" || !Array.isArray(data.containers)) return;
    if (data.change === "deleted") this.#drop(data.uid);
    else this.#put(channel, data);
    this.#tidy();
  }

  /** Show no more what came through this channel alone. */
  forget(channel) {
    for (const [uid, { channels }] of this.#shown) {
      channels.delete(channel);
      if (!channels.size) this.#drop(uid);
    }
    this.#tidy();
  }

  #put(channel, pod) {
    const known = this.#shown.get(pod.uid);
    known?.channels.add(channel);
    if (known && BigInt(known.pod.resource_version) > BigInt(pod.resource_version)) return;
    const one = known ?? { channels: new Set([channel]), item: document.createElement("li"), warning: null };
    one.pod = pod;
    this.#shown.set(pod.uid, one);
    this.#draw(one);
    if (!known) this.#list.append(one.item);
  }

  #warn(data) {
    for (const one of this.#shown.values()) {
      if (one.pod.namespace !== data.namespace || data.object !== `Pod/${one.pod.pod}`) continue;
      one.warning = data;
      this.#draw(one);
    }
  }

  #drop(uid) {
    this.#shown.get(uid)?.item.remove();
    this.#shown.delete(uid);
  }

  #draw({ item, pod, warning }) {
    const tones = pod.containers.map(toneOf);
    const bad = tones.includes("bad") || pod.phase === "Failed" || (pod.reason && pod.phase === "Pending");
    item.dataset.tone = pod.ready ? "good" : bad ? "bad" : "busy";
    item.dataset.pod = pod.pod;
    const head = node("p", "", "");
    const about = [pod.phase, pod.session_id && `session ${pod.session_id}`, pod.node && `on ${pod.node}`, pod.reason];
    head.append(node("b", "", pod.pod), node("span", "about", about.filter(Boolean).join(" · ")));
    item.replaceChildren(head);
    if (pod.message) item.append(node("p", "", pod.message));
    const list = node("ul", "", "");
    pod.containers.forEach((container, index) => {
      const line = document.createElement("li");
      line.dataset.tone = tones[index];
      line.append(node("b", "", container.name), node("span", "tone", describeContainer(container)));
      if (container.message && !container.ready) line.append(node("span", "about", ` ${container.message}`));
      list.append(line);
    });
    item.append(list);
    if (warning && !pod.ready) {
      const often = warning.count > 1 ? ` (${warning.count} times)` : "";
      item.append(node("p", "about", `${warning.reason}: ${warning.message}${often}`));
    }
  }

  #tidy() {
    while (this.#shown.size > MOST_PODS) this.#drop(this.#shown.keys().next().value);
    this.#section.hidden = !this.#shown.size;
  }
}
