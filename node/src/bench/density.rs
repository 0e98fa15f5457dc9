//! `trine bench density`: guests side by side, what each costs in memory, and how many a second
//! come and go.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmm::bench::memory::Memory;
use vmm::bench::{Devices, Image, Running, floor, launch};
use vmm::spawner::Client;

use super::{Figures, Series};
use crate::embedded::{self, GUEST_IMAGE};

/// Memory of each guest, MiB.
const MEMORY_MIB: u32 = 128;
/// Most guests that are asked for: each is a process.
const GUESTS_MAX: usize = 10_000;
/// Part of the host's free memory that stays free.
const KEPT_FREE: u64 = 4;
/// How long the last guest may take to become idle.
const SETTLE: Duration = Duration::from_secs(20);
const MIB: f64 = (1 << 20) as f64;
const METHOD: &str = "density/*: built-in guests of 128 MiB with one virtio-blk and one virtio-net, \
    sandbox on, started one after another until the asked number or a quarter of the memory that \
    was available is left; all run at once when they are measured. private: pages of a guest's \
    process that no other process has, without the guest's own memory (from /proc/PID/smaps). \
    guest: what a guest has touched of its memory. available: by how much the host's MemAvailable \
    fell, for each guest, the kernel's own memory included. launches: each round starts and ends \
    the floor program and guests (without and with devices) in turn, as many at once as the host has \
    processors; a launch counts when its process has ended, memory and VM taken back.";

/// How much is measured.
pub(super) struct Options {
    /// Guests at once.
    pub(super) guests: usize,
    /// Rounds of launches.
    pub(super) rounds: usize,
    /// Launches of each kind in a round.
    pub(super) launches: usize,
}

/// Measures with a spawner of its own; no cloud is needed.
pub(super) fn density(options: &Options) -> Result<Figures> {
    ensure!(
        (1..=GUESTS_MAX).contains(&options.guests),
        "--guests {}; it must be 1 to {GUESTS_MAX}",
        options.guests
    );
    ensure!(options.rounds > 0, "--rounds is 0; at least one round must be measured");
    ensure!(options.launches > 0, "--launches is 0; at least one launch must be measured");
    let bench = Bench::prepare()?;
    let mut series = Vec::new();
    series.extend(bench.side_by_side(options.guests)?);
    series.extend(bench.rates(options)?);
    let mut figures =
        Figures { bench: "density".into(), method: METHOD.into(), series, failures: 0 };
    for kind in ["launches/no-devices", "launches/devices"] {
        figures.relate(kind, "launches/floor");
    }
    Ok(figures)
}

struct Bench {
    spawner: Client,
    floor: File,
    kernel: File,
}

impl Bench {
    fn prepare() -> Result<Bench> {
        let directory = tempfile::Builder::new().prefix("trine-bench-").tempdir()?;
        let executables = embedded::install(directory.path())?;
        let kernel = directory.path().join("guest.elf");
        std::fs::write(&kernel, GUEST_IMAGE)?;
        Ok(Bench {
            spawner: Client::start(&executables.vmm)?,
            floor: File::open(&executables.floor)?,
            kernel: File::open(kernel)?,
        })
    }

    fn image<'a>(&'a self, cmdline: &'a str) -> Image<'a> {
        Image { kernel: &self.kernel, cmdline, memory_mib: MEMORY_MIB }
    }

    /// Starts guests that stay, measures them, ends them.
    fn side_by_side(&self, asked: usize) -> Result<Vec<Series>> {
        let before = available_bytes()?;
        let mut guests = Vec::new();
        while guests.len() < asked && available_bytes()? > before / KEPT_FREE {
            let guest = Running::start(&self.spawner, self.image(""), Devices::BlockAndNet)
                .with_context(|| format!("guest {} of {asked}", guests.len() + 1))?;
            guests.push(guest);
        }
        let memory = settled(&guests);
        let after = available_bytes()?;
        for guest in guests {
            guest.kill()?;
        }
        let memory = memory?;
        let mib = |bytes: fn(&Memory) -> u64| {
            memory.iter().map(|memory| bytes(memory) as f64 / MIB).collect::<Vec<_>>()
        };
        let each = before.saturating_sub(after) as f64 / MIB / memory.len() as f64;
        let series = [
            Series::new("density/guests", "guests", vec![memory.len() as f64]),
            Series::new("density/private", "MiB", mib(|memory| memory.vmm_bytes)),
            Series::new("density/guest", "MiB", mib(|memory| memory.guest_bytes)),
            Series::new("density/available", "MiB", vec![each]),
        ];
        Ok(series.into_iter().flatten().collect())
    }

    /// Launches a second, teardown included.
    fn rates(&self, options: &Options) -> Result<Vec<Series>> {
        let threads = std::thread::available_parallelism()?.get();
        let started = |devices| {
            launch(&self.spawner, self.image("exit-after-main"), devices)?;
            Ok(())
        };
        let kinds: [(&str, &Launch<'_>); 3] = [
            ("launches/floor", &|| Ok(floor(&self.spawner, &self.floor, MEMORY_MIB).map(drop)?)),
            ("launches/no-devices", &|| started(Devices::None)),
            ("launches/devices", &|| started(Devices::BlockAndNet)),
        ];
        let mut rates = kinds.map(|(name, _)| (name, Vec::new()));
        for round in 0..=options.rounds {
            for ((_, launch), (_, rates)) in kinds.iter().zip(&mut rates) {
                let rate = rate(*launch, options.launches, threads)?;
                // The first round warms up.
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        Ok(rates
            .into_iter()
            .filter_map(|(name, rates)| Series::new(name, "per s", rates))
            .collect())
    }
}

type Launch<'a> = dyn Fn() -> Result<()> + Sync + 'a;

/// `count` launches by `threads` threads: launches a second.
fn rate(launch: &Launch<'_>, count: usize, threads: usize) -> Result<f64> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let share = (worker..count).step_by(threads).len();
                scope.spawn(move || (0..share).try_for_each(|_| launch()))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().map_err(|_| anyhow::anyhow!("a thread that launches panicked"))?
        })
    })?;
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// The memory of each guest once none of them changes any more.
fn settled(guests: &[Running]) -> Result<Vec<Memory>> {
    let start = Instant::now();
    let look = || -> Result<Vec<Memory>> {
        let memory = |guest: &Running| {
            ensure!(!guest.has_ended()?, "a guest has ended; it was to stay");
            guest.memory().context("read a guest's memory map (only root may)")
        };
        guests.iter().map(memory).collect()
    };
    let mut last = look()?;
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = look()?;
        if now == last || start.elapsed() > SETTLE {
            return Ok(now);
        }
        last = now;
    }
}

/// What the kernel could give to new processes, bytes.
fn available_bytes() -> Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok())
        .context("/proc/meminfo has no MemAvailable")?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_launch_of_a_rate_is_made_once_and_a_failure_shows() {
        let made = AtomicUsize::new(0);
        let count = || {
            made.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        assert!(rate(&count, 7, 3).unwrap() > 0.0);
        assert_eq!(made.load(Ordering::Relaxed), 7);
        assert!(rate(&|| anyhow::bail!("no"), 2, 4).is_err());
    }

    #[test]
    fn guests_side_by_side_are_measured_with_their_rates() {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIPPED: no /dev/kvm");
            return;
        }
        let figures = density(&Options { guests: 3, rounds: 1, launches: 4 });
        if std::fs::metadata("/proc/self").is_ok_and(|own| !is_root(&own)) {
            assert!(figures.is_err_and(|error| format!("{error:#}").contains("only root")));
            return;
        }
        let figures = figures.unwrap();
        let p50 = |name: &str| figures.find(name).map(|series| series.p50);
        assert_eq!(p50("density/guests"), Some(3.0));
        assert!(p50("density/private").is_some_and(|mib| mib > 0.0 && mib <= 2.0));
        assert!(p50("density/guest").is_some_and(|mib| mib > 0.1 && mib < 128.0));
        for kind in ["launches/no-devices", "launches/devices"] {
            let ratio = figures.find(kind).and_then(|series| series.ratio_to_floor_p50);
            assert!(ratio.is_some_and(|ratio| ratio > 0.0), "{kind}: {ratio:?}");
        }
    }

    fn is_root(own: &std::fs::Metadata) -> bool {
        std::os::unix::fs::MetadataExt::uid(own) == 0
    }
}
