"""A page on this machine, to try a face parser on photographs: demo.py --models DIR."""

import os
import sys
import time

from faceparse import cli, privacy
from faceparse.data import DataError
from faceparse.inference.face_parser import FaceParser
from faceparse.inference.image_io import set_limit

ADDRESS = "127.0.0.1"
SESSIONS = 20  # pages whose photograph is kept in memory
SWEEP = 60  # seconds between two looks for old files
CSS = """
#areas table {width: 100%; border-collapse: collapse}
#areas * {border: none !important}
#areas td, #areas th {padding: 0.1em 0; text-align: right}
#areas td:first-child, #areas th:first-child {text-align: left}
#areas i {display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em}
footer {display: none !important}
"""


def main():
    parser = cli.Parser(description=__doc__)
    cli.add_models_argument(parser)
    cli.add_limit_argument(parser)
    parser.add_argument(
        "--port", type=cli.number(int, 1, 65535), help="default: a free one from 7860"
    )
    parser.add_argument("--device", type=cli.device, default="cpu")
    args = parser.parse_args()
    cli.require("gradio", "matplotlib")
    # Here, so that --help and the line above need neither.
    import gradio as gr
    from starlette.middleware import Middleware

    from faceparse.demo_page import make_page

    set_limit(args.max_megapixels)
    faces = FaceParser.load(args.models, device=args.device)
    with privacy.stoppable(), privacy.photograph_folder() as folder:
        # Gradio calls its own server, which no proxy would find.
        os.environ.update(GRADIO_TEMP_DIR=str(folder), no_proxy=ADDRESS)
        page = make_page(faces)
        try:
            _, url, _ = page.launch(
                server_name=ADDRESS,
                server_port=args.port,
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                run_history=False,
                max_file_size="100mb",
                state_session_capacity=SESSIONS,
                theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
                css=CSS,
                app_kwargs={"middleware": [Middleware(privacy.OwnPagesOnly, address=ADDRESS)]},
            )
        except OSError:
            given = f"{args.port} is not" if args.port else "none from 7860 to 7959 is"
            raise DataError(f"--port must be free, {given}") from None
        try:
            cli.say(url)
            while True:
                time.sleep(SWEEP)
                privacy.sweep(folder)
        except KeyboardInterrupt:
            page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
