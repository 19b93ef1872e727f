"use strict";
// Server API: JSON requests and streamed chat completions.

const api = {
  key: "",

  headers() {
    const found = { "content-type": "application/json" };
    if (this.key) found.authorization = `Bearer ${this.key}`;
    return found;
  },

  async call(method, path, body) {
    let answer;
    try {
      answer = await fetch(path, { method, headers: this.headers(), body: body && JSON.stringify(body) });
    } catch {
      throw new Error("the server cannot be reached");
    }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(found.error?.message || `the server returned status ${answer.status}`);
    return found;
  },

  // Stream a chat completion; call on(chunk) for each event.
  async chat(body, on, signal) {
    let answer;
    try {
      answer = await fetch("/v1/chat/completions", {
        method: "POST", headers: this.headers(), body: JSON.stringify({ ...body, stream: true }), signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server cannot be reached");
    }
    if (!answer.ok) {
      const found = await answer.json().catch(() => ({}));
      throw new Error(found.error?.message || `the server returned status ${answer.status}`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") { ended = true; continue; }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        on(chunk);
      }
    }
    if (!ended) throw new Error("the stream ended early");
  },
};
