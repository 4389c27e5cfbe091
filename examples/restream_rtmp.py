"""Go live: open a stream, push it to a service, and change its prompt on a schedule.

The server's operator must have listed the service: `python -m server --outputs live.example`.

    python restream_rtmp.py rtmps://live.example/app/KEY "a red ball on grass" "a blue cube on snow" --every 30
"""

import argparse
import sys

from livereel import Client, PromptChange, events

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("url", help="rtmp:// or rtmps:// with the stream key, or https:// for WHIP")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--every", type=float, default=30, help="seconds of video per prompt")
options = parser.parse_args()

first, *rest = options.prompts
later = [PromptChange(options.every * number, prompt, "soft") for number, prompt in enumerate(rest, 1)]
length = options.every * len(options.prompts)
with Client() as client, client.stream(first, duration_s=length, prompts=later) as stream:
    output = stream.push(options.url)
    print(f"pushing to {output.url}", flush=True)
    for event in stream.events():
        match event:
            case events.OutputState():
                reason = f": {event.error.message}" if event.error else ""
                print(f"output {event.state}{reason}", flush=True)
            case events.PromptApplied():
                print(f"now: {event.prompt}", flush=True)
            case events.StreamError():
                print(event.message, file=sys.stderr)
