//! What the simulator is told on its command line.

use std::time::Duration;

/// How many seeds, and what is shown.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The first seed.
    pub(crate) seed: u64,
    /// How many; none means until the time is over.
    seeds: Option<u64>,
    /// For how long.
    time: Option<Duration>,
    /// Runs at a time.
    pub(crate) jobs: usize,
    /// Prints everything that happens.
    pub(crate) trace: bool,
    /// Prints a line for each seed.
    pub(crate) verbose: bool,
}

impl Options {
    /// Reads `--seed N --seeds K --seconds S --jobs J --trace --verbose`.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            seed: 0,
            seeds: None,
            time: None,
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            trace: false,
            verbose: false,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let value = arguments.next().unwrap_or_default();
                value.parse::<u64>().map_err(|_| format!("{argument} {value}: it takes a number"))
            };
            match argument.as_str() {
                "--seed" => options.seed = number()?,
                "--seeds" => options.seeds = Some(number()?),
                "--seconds" => options.time = Some(Duration::from_secs(number()?)),
                "--jobs" => options.jobs = usize::try_from(number()?.max(1)).unwrap_or(1),
                "--trace" => options.trace = true,
                "--verbose" => options.verbose = true,
                other => return Err(format!("{other} isn't an option of the simulator")),
            }
        }
        if options.trace {
            (options.jobs, options.seeds) = (1, Some(options.seeds.unwrap_or(1)));
        }
        Ok(options)
    }

    /// Whether this seed is to be run, so long after the start.
    pub(crate) fn wants(&self, seed: u64, since: Duration) -> bool {
        let all = self.seeds.or_else(|| self.time.is_none().then_some(1));
        all.is_none_or(|all| seed - self.seed < all) && self.time.is_none_or(|time| since < time)
    }
}
