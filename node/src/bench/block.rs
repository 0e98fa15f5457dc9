//! `trine bench block`: a guest's disk beside the file that it is.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmm::bench::Image;
use vmm::bench::block::{Done, Load, in_guest, on_host};
use vmm::spawner::Client;

use super::{Figures, Series};
use crate::embedded::{self, GUEST_IMAGE};

const MEMORY_MIB: u32 = 128;
const MIB: u64 = 1 << 20;
/// Smallest file: a sequence must not be the same few blocks.
const FILE_MIB_MIN: u64 = 16;
const METHOD: &str = "One file, in turn: by io_uring on the host (host/*), and by the built-in guest \
    through virtio-blk of a sandboxed VMM (block/*), the same requests at once. rand: 4 KiB anywhere; \
    seq: 1 MiB one after another, 4 at once. Each figure is a whole run of that length. The ratio is \
    the guest's median to the host's. added/*: microseconds that one request at a time takes longer \
    in the guest, round by round.";

/// How much is measured.
pub(super) struct Options {
    /// Rounds of each series.
    pub(super) rounds: usize,
    /// Length of one run.
    pub(super) length: Duration,
    /// Size of the file.
    pub(super) file_mib: u64,
    /// Where the file is made.
    pub(super) directory: Option<PathBuf>,
    /// Through the host's page cache.
    pub(super) buffered: bool,
}

/// A series: its name, and what is asked of the disk.
const SERIES: [(&str, Shape); 6] = [
    ("randread-4k-qd1", Shape { write: false, random: true, bytes: 4096, depth: 1 }),
    ("randread-4k-qd32", Shape { write: false, random: true, bytes: 4096, depth: 32 }),
    ("randwrite-4k-qd1", Shape { write: true, random: true, bytes: 4096, depth: 1 }),
    ("randwrite-4k-qd32", Shape { write: true, random: true, bytes: 4096, depth: 32 }),
    ("seqread-1m", Shape { write: false, random: false, bytes: 1 << 20, depth: 4 }),
    ("seqwrite-1m", Shape { write: true, random: false, bytes: 1 << 20, depth: 4 }),
];

#[derive(Clone, Copy)]
struct Shape {
    write: bool,
    random: bool,
    bytes: u32,
    depth: u32,
}

impl Shape {
    fn load(self, length: Duration) -> Load {
        let Shape { write, random, bytes, depth } = self;
        Load { write, random, bytes, depth, length }
    }
}

/// Measures with a spawner and a file of its own; no cloud is needed.
pub(super) fn block(options: &Options) -> Result<Figures> {
    ensure!(options.rounds > 0, "--rounds is 0; at least one round must be measured");
    ensure!(
        options.file_mib >= FILE_MIB_MIN,
        "--file-mib {}; it must be at least {FILE_MIB_MIN}",
        options.file_mib
    );
    let bench = Bench::prepare(options)?;
    let mut samples: Vec<Samples> = SERIES.iter().map(|_| Samples::default()).collect();
    for round in 0..options.rounds {
        for ((name, shape), samples) in SERIES.iter().zip(&mut samples) {
            let load = shape.load(options.length);
            let (host, guest) =
                bench.both(load, round % 2 == 0).with_context(|| format!("series {name}"))?;
            samples.add(host, guest);
        }
    }
    let mut figures = Figures {
        bench: "block".into(),
        method: format!("{METHOD} {}", how(options)),
        series: Vec::new(),
        failures: 0,
    };
    for ((name, shape), samples) in SERIES.iter().zip(samples) {
        samples.into_figures(name, shape.depth == 1, &mut figures);
    }
    Ok(figures)
}

fn how(options: &Options) -> String {
    let cache = if options.buffered { "through the page cache" } else { "with O_DIRECT" };
    format!("File of {} MiB, opened {cache}; runs of {:?}.", options.file_mib, options.length)
}

struct Bench {
    spawner: Client,
    kernel: File,
    disk: File,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn prepare(options: &Options) -> Result<Bench> {
        let mut directory = tempfile::Builder::new();
        directory.prefix("trine-bench-");
        let directory = match &options.directory {
            Some(parent) => directory.tempdir_in(parent),
            None => directory.tempdir(),
        }
        .context("make a directory for the file under load")?;
        let executables = embedded::install(directory.path())?;
        let kernel = directory.path().join("guest.elf");
        std::fs::write(&kernel, GUEST_IMAGE)?;
        let disk = directory.path().join("disk");
        fill(&disk, options.file_mib)?;
        let mut open = OpenOptions::new();
        open.read(true).write(true);
        if !options.buffered {
            open.custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
        }
        let disk = open.open(&disk).with_context(|| {
            format!("open {}; where its file system has no O_DIRECT: --buffered", disk.display())
        })?;
        let kernel = File::open(kernel)?;
        let spawner = Client::start(&executables.vmm)?;
        Ok(Bench { spawner, kernel, disk, _directory: directory })
    }

    /// The load on the host and in a guest; whichever is to be first.
    fn both(&self, load: Load, host_first: bool) -> Result<(Done, Done)> {
        if host_first {
            let host = on_host(&self.disk, load)?;
            return Ok((host, self.in_guest(load)?));
        }
        let guest = self.in_guest(load)?;
        Ok((on_host(&self.disk, load)?, guest))
    }

    fn in_guest(&self, load: Load) -> Result<Done> {
        let image = Image { kernel: &self.kernel, cmdline: "", memory_mib: MEMORY_MIB };
        let mut drive = tempfile::tempfile()?;
        drive.write_all(&config_drive(load)?)?;
        Ok(in_guest(&self.spawner, image, &drive, &self.disk)?)
    }
}

/// Tells the guest what to do.
fn config_drive(load: Load) -> Result<Vec<u8>> {
    let meta_data = br#"{"uuid": "bench", "hostname": "bench"}"#.to_vec();
    Ok(storage::config_drive::image(BTreeMap::from([
        ("openstack/latest/meta_data.json".to_string(), meta_data),
        ("openstack/latest/user_data".to_string(), load.steps().into_bytes()),
    ]))?)
}

/// A file whose every block was written: reading a hole would read nothing.
fn fill(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..MIB).map(|n| ((n * 31) >> 3) as u8).collect();
    for _ in 0..mib {
        file.write_all(&block).with_context(|| format!("fill {} MiB", mib))?;
    }
    Ok(file.sync_all()?)
}

/// What one series came to, round by round.
#[derive(Default)]
struct Samples {
    host: Vec<f64>,
    guest: Vec<f64>,
    added_us: Vec<f64>,
}

impl Samples {
    fn add(&mut self, host: Done, guest: Done) {
        let (host, guest) = (host.per_second(), guest.per_second());
        self.host.push(host);
        self.guest.push(guest);
        self.added_us.push(1e6 / guest - 1e6 / host);
    }

    fn into_figures(self, name: &str, one_at_a_time: bool, figures: &mut Figures) {
        let (host, guest) = (format!("host/{name}"), format!("block/{name}"));
        figures.series.extend(Series::new(&host, "per s", self.host));
        figures.series.extend(Series::new(&guest, "per s", self.guest));
        figures.relate(&guest, &host);
        if one_at_a_time {
            let added = Series::new(&format!("added/{name}"), "µs", self.added_us);
            figures.series.extend(added);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_drives_each_load_beside_the_host() {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIPPED: no /dev/kvm");
            return;
        }
        let figures = block(&Options {
            rounds: 1,
            length: Duration::from_millis(50),
            file_mib: FILE_MIB_MIN,
            directory: None,
            buffered: true,
        })
        .unwrap();
        for (name, shape) in SERIES {
            let guest = figures.find(&format!("block/{name}")).unwrap();
            assert!(guest.p50 > 0.0 && guest.ratio_to_floor_p50.is_some(), "{name}: {guest:?}");
            assert!(figures.find(&format!("host/{name}")).unwrap().p50 > 0.0, "{name}");
            let added = figures.find(&format!("added/{name}"));
            assert_eq!(added.is_some(), shape.depth == 1, "{name}");
        }
    }
}
