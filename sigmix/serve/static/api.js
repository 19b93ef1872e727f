"use strict";
// Server API: JSON requests and streamed chat completions.

const api = {
  key: "",

  // Send a request with a JSON body or a form; errors have the status of the response, if there is one.
  async send(method, path, body, signal) {
    const headers = {};
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    if (body && !(body instanceof FormData)) {
      headers["content-type"] = "application/json";
      body = JSON.stringify(body);
    }
    let answer;
    try {
      // a deletion is completed when the page is left
      answer = await fetch(path, { method, headers, body, signal, keepalive: method === "DELETE" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server cannot be reached");
    }
    if (answer.ok) return answer;
    const found = await answer.json().catch(() => ({}));
    const error = new Error(found.error?.message || `the server returned status ${answer.status}`);
    error.status = answer.status;
    error.param = found.error?.param; // path of the invalid field
    throw error;
  },

  async call(method, path, body) {
    return (await this.send(method, path, body)).json().catch(() => ({}));
  },

  // Stream a chat completion; call on(chunk) for each event.
  chat(body, on, signal) {
    return this.stream("POST", "/v1/chat/completions", { ...body, stream: true }, on, signal);
  },

  async stream(method, path, body, on, signal) {
    const answer = await this.send(method, path, body, signal);
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
