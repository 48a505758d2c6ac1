"""An OpenAI-compatible endpoint on this machine, which answers as a test says: well, with errors,
not at all, or with lies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STALL = object()


def completion(text, logprobs=None, model="stub-2026"):
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


class StubJudge:
    """reply(request, number) -> a completion; or (status, body); or STALL: no answer until the
    end. `asked` are the bodies of the requests, `keys` the keys that they came with."""

    def __init__(self, reply):
        self.asked, self.keys = [], set()
        self._lock, self._end = threading.Lock(), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.asked.append(body)
                    stub.keys.add(self.headers["Authorization"])
                    number = len(stub.asked)
                found = reply(body, number)
                if found is STALL:
                    stub._end.wait(60)
                    return
                status, content = found if isinstance(found, tuple) else (200, found)
                is_text = isinstance(content, str)
                sent = (content if is_text else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if is_text else "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
