// Node's `ws`: `send` to one subscriber after the other.
//
//   node --expose-gc ws_loop.js PORT CONTROL_PORT FOLDER    FOLDER holds node_modules/ws

"use strict";

const net = require("node:net");
const { createRequire } = require("node:module");
const { WebSocketServer } = createRequire(`${process.argv[4]}/`)("ws");

const [port, controlPort] = process.argv.slice(2).map(Number);
const subscribers = new Map();

function publish(channel, body) {
  for (const socket of subscribers.get(channel) ?? []) socket.send(body, { binary: false });
}

const server = new WebSocketServer({ host: "127.0.0.1", port, perMessageDeflate: false, backlog: 4096 });
server.on("connection", (socket, request) => {
  const channels = new URL(request.url, "http://localhost").searchParams.get("channels").split(",");
  for (const channel of channels) {
    if (!subscribers.has(channel)) subscribers.set(channel, new Set());
    subscribers.get(channel).add(socket);
  }
  socket.on("error", () => {});
  socket.on("close", () => {
    for (const channel of channels) {
      const listed = subscribers.get(channel);
      listed.delete(socket);
      if (listed.size === 0) subscribers.delete(channel);
    }
  });
});

// As control.py writes them.
net
  .createServer((connection) => {
    let kept = Buffer.alloc(0);
    connection.on("error", () => {});
    connection.on("data", (data) => {
      if (kept.length > 0) data = Buffer.concat([kept, data]);
      let at = 0;
      while (data.length - at >= 4) {
        const length = data.readUInt32BE(at);
        if (data.length - at - 4 < length) break;
        if (length === 1) {
          // What is asked for is memory: what is garbage should not count.
          global.gc();
          connection.write("{}\n");
        } else {
          const name = data.readUInt16BE(at + 5);
          publish(data.toString("latin1", at + 7, at + 7 + name), data.subarray(at + 7 + name, at + 4 + length));
        }
        at += 4 + length;
      }
      kept = data.subarray(at);
    });
  })
  .listen(controlPort, "127.0.0.1");
