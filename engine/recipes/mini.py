"""The teacher and the student of the embedded model in one process: pools are coded once, then used twice.

`engine/recipes/train_mini.sh` has the whole recipe. This stage resumes from the checkpoints in `--folder`. Its seconds
include compilation. With `--distill-share 0` the teacher alone is trained, at a learning rate that stays up for a later
call unless `--finish` is given; with 1 only the student is.
"""

from engine.config import MINI
from engine.recipes import distill, teacher
from engine.recipes.run import Run, arguments


def main() -> None:
    parser = arguments(__doc__, 560)
    parser.add_argument("--distill-share", type=float, default=0.35, help="of the time left when the pools are coded")
    parser.add_argument(
        "--finish", action="store_true", help="let the teacher's learning rate fall to the end of this call"
    )
    parser.add_argument("--pool", type=int, default=10_000, help="clips coded ahead of training, on all ranks together")
    parser.add_argument("--firsts", type=int, default=48_000, help="first chunks coded ahead of training, likewise")
    parser.add_argument("--seed", type=int, default=7, help="of the pools")
    options = parser.parse_args()
    whole = Run("mini", options.folder, options.seconds)
    pools = teacher.code_pools(whole, MINI, options.pool // whole.ranks, options.firsts // whole.ranks, options.seed)
    left = options.seconds - whole.elapsed()
    if options.distill_share < 1:
        run = Run("teacher", options.folder, left * (1 - options.distill_share))
        teacher.train(
            run,
            MINI,
            pools,
            clip_batch=teacher.CLIPS,
            first_batch=teacher.FIRST_CLIPS,
            final=options.finish or options.distill_share > 0,
        )
    if options.distill_share > 0:
        run = Run("distill", options.folder, options.seconds - whole.elapsed())
        distill.train(run, MINI, pools, clip_batch=teacher.CLIPS, first_batch=teacher.FIRST_CLIPS)


if __name__ == "__main__":
    main()
