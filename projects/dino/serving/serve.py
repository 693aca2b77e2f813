"""Serve a checkpoint over HTTP by FastAPI and uvicorn: pictures run in batches, and a full queue answers 503.

    python projects/dino/serving/serve.py output/mine --port 8000
    curl -F image=@photo.jpg http://127.0.0.1:8000/predict

Needs the extra `serve` (pip install ".[serve]"). docs/serving.md explains.
"""

import asyncio
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from dino import Predictor
from dino.cli import SCORE_THRESH, arguments, check_arguments, new_parser, report_errors
from dino.data.images import IMAGE_SUFFIXES
from dino.inference.cpu import keep_freed_memory
from dino.utils.files import DataError, UserError

try:
    import python_multipart
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
except ImportError as error:
    sys.exit(f"error: the server needs more packages: pip install '.[serve]' ({error})")

FIELD = "send the picture as a file in the form field image: curl -F image=@photo.jpg ADDRESS/predict"
GRACE = 30  # seconds that requests have to end after SIGTERM


class Service:
    """Detects in uploaded pictures: one thread decodes them, another one runs the network on those that wait.

    Args:
        predictor: its `batch_size` is the most pictures that run together, its `max_pixels` the most that one may have.
        queue: most requests at a time, those that run included; the next one gets 503.
    """

    def __init__(self, predictor, queue):
        self.predictor = predictor
        self.slots = asyncio.Semaphore(queue)
        self.waiting = asyncio.Queue()  # (pixels, future of the detections)
        self.decoding, self.detecting = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def predict(self, image: UploadFile) -> dict:
        """Detections of one picture, best first: box (x0, y0, x1, y1 in pixels, not clipped), score, label, name."""
        if self.slots.locked():
            raise HTTPException(503, "the queue is full; try again in a second", {"Retry-After": "1"})
        async with self.slots:
            loop = asyncio.get_running_loop()
            try:
                pixels = await loop.run_in_executor(self.decoding, self.read, image)
            except DataError as error:
                raise HTTPException(400, str(error)) from error
            answer = loop.create_future()
            self.waiting.put_nowait((pixels, answer))
            return describe(await answer)

    async def health(self) -> dict:
        """Whether pictures are served, and how many wait."""
        if self.worker.done():
            raise HTTPException(503, "the worker has stopped")
        return {"status": "ok", "waiting": self.waiting.qsize(), "names": self.predictor.names}

    def read(self, image):
        """(H, W, 3) uint8 of an upload, by the rules for files; an error calls it by the client's name."""
        suffix = Path(image.filename or "").suffix.lower()
        with tempfile.NamedTemporaryFile(suffix=suffix if suffix in IMAGE_SUFFIXES else "") as file:
            file.write(image.file.read())
            file.flush()
            try:
                return self.predictor.read(Path(file.name))
            except DataError as error:
                text = str(error).partition(". ")[0]  # without the advice for a data set
                raise DataError(text.replace(file.name, repr(image.filename))) from error

    async def work(self):
        """Run the pictures that wait, batch by batch."""
        while True:
            batch = [await self.waiting.get()]
            while self.waiting.qsize() and len(batch) < self.predictor.batch_size:
                batch.append(self.waiting.get_nowait())
            pictures, answers = zip(*batch, strict=True)
            detect = asyncio.get_running_loop().run_in_executor(self.detecting, self.detect, pictures)
            for answer, found in zip(answers, await detect, strict=True):
                if not answer.done():
                    (answer.set_exception if isinstance(found, Exception) else answer.set_result)(found)

    def detect(self, pictures):
        """Detections, or the error, of each picture; after an error they run one by one, so that only one fails."""
        try:
            return self.predictor(list(pictures))
        except Exception as error:
            return [error] if len(pictures) == 1 else [found for one in pictures for found in self.detect([one])]

    @asynccontextmanager
    async def lifespan(self, app):
        """Work while the server runs. It stops after the last answer."""
        self.worker = asyncio.create_task(self.work())
        yield
        self.worker.cancel()


def describe(found):
    """`Detections` as JSON."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names, strict=True)
    objects = [dict(zip(("box", "score", "label", "name"), row, strict=True)) for row in rows]
    height, width = found.image_size
    return {"width": width, "height": height, "detections": objects}


def make_app(service, max_bytes):
    """The application; a request of more than `max_bytes` is refused before it is read."""
    app = FastAPI(title="DINO", lifespan=service.lifespan)
    app.post("/predict")(service.predict)
    app.get("/health")(service.health)

    @app.middleware("http")
    async def limit_bytes(request: Request, run):
        length = request.headers.get("content-length", "" if request.method == "POST" else "0")
        if not length.isdecimal() or "transfer-encoding" in request.headers:
            return JSONResponse({"detail": "a request needs the header Content-Length"}, 411)
        if int(length) > max_bytes:
            return JSONResponse({"detail": f"{length} bytes, more than the limit of {max_bytes}"}, 413)
        return await run(request)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error):
        return JSONResponse({"detail": FIELD}, 422)

    return app


def build_parser():
    parser = new_parser("serve.py", __doc__, "")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, the folder of a run, an address or name"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--score-thresh", type=float, default=SCORE_THRESH, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="most pictures that run together (%(default)s)")
    parser.add_argument("--queue", type=int, default=16, help="most requests at a time (default %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of a request (default %(default)s)")
    parser.add_argument("--max-pixels", type=int, default=25_000_000, help="of a picture (default %(default)s)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    lowest = min(args.batch_size, args.queue, args.max_bytes, args.max_pixels)
    wrong = {"--batch-size, --queue, --max-bytes and --max-pixels must be positive": lowest < 1}
    wrong["--score-thresh must lie between 0 and 1"] = not 0 <= args.score_thresh <= 1
    wrong["--port must lie between 0 and 65535"] = not 0 <= args.port < 65536
    check_arguments(parser, wrong)
    keep_freed_memory()
    options = {name: getattr(args, name) for name in ("device", "score_thresh", "batch_size", "max_pixels")}
    try:
        predictor = Predictor.from_checkpoint(arguments.find_checkpoint(args.checkpoint), **options)
    except RuntimeError as error:  # of PyTorch about the device
        raise UserError(f"can't run on {args.device or 'this machine'}: {str(error).splitlines()[0]}") from error
    app = make_app(Service(predictor, args.queue), args.max_bytes)
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=GRACE)


if __name__ == "__main__":
    sys.exit(report_errors(main))
