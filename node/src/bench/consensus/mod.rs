//! `trine bench raft`: what a commit costs, and how many there are in a second, beside etcd.

mod etcd;
mod grpc;
mod load;
mod member;
mod trine;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Figures, Series};
use crate::cluster::Addresses;

pub(crate) use member::run as run_member;

/// Bytes of etcd's keys.
const KEY_BYTES: usize = 8;
/// `fdatasync` calls measured in each round.
const FDATASYNCS: usize = 50;

const METHOD: &str = "Three members of each cluster as processes on this machine, both clusters \
    running throughout, rounds taken in turn after one that warms up. Closed-loop writers on plain \
    TCP connections to the leader, up to 32 on a connection, one generator for both. trine: the \
    product's consensus, log with fdatasync, mutual TLS between members and replicated state; each \
    write is a command of the product (UpdateHost) without the HTTP API. etcd: KV/Put by gRPC on \
    HTTP/2 (a client of ours that does only that), 8-byte keys, values that make the write as \
    long as ours, its defaults otherwise, no TLS between its members. Latency from the request's \
    last byte built to its answer read; ratio: trine's median latency as a multiple of etcd's.";

/// How much is measured.
pub(crate) struct Options {
    /// Rounds of each series.
    pub(crate) rounds: usize,
    /// Length of a round.
    pub(crate) length: Duration,
    /// Numbers of writers.
    pub(crate) writers: Vec<usize>,
    /// Leaves etcd out.
    pub(crate) alone: bool,
}

/// Measures.
pub(crate) async fn consensus(options: &Options) -> Result<Figures> {
    ensure!(options.rounds > 0, "--rounds is 0; at least one must be measured");
    ensure!(
        options.writers.iter().all(|writers| (1..=1024).contains(writers)),
        "--writers must be 1 to 1024"
    );
    let directory = tempfile::Builder::new().prefix("trine-bench-").tempdir()?;
    let addresses = Addresses::of_process(std::process::id()).nodes();
    let ours = trine::Members::start(directory.path(), addresses).await?;
    let installed = if options.alone { None } else { etcd::installed().await };
    let theirs = match &installed {
        Some((program, _)) => {
            Some(etcd::Members::start(program, directory.path(), addresses).await?)
        }
        None => None,
    };
    let mut samples = Samples::default();
    let measured = measure(options, directory.path(), &ours, theirs.as_ref(), &mut samples).await;
    ours.end().await;
    if let Some(theirs) = theirs {
        theirs.end().await;
    }
    measured?;
    Ok(samples.figures(options, installed.map(|(_, version)| version)))
}

async fn measure(
    options: &Options,
    directory: &Path,
    ours: &trine::Members,
    theirs: Option<&etcd::Members>,
    samples: &mut Samples,
) -> Result<()> {
    let at = ours.leader;
    let value_bytes = member::command(at, u64::from(u32::MAX)).len() - KEY_BYTES;
    for round in 0..=options.rounds {
        let mut warm_up = Samples::default();
        let samples = if round == 0 { &mut warm_up } else { &mut *samples };
        samples.fdatasync(directory)?;
        for &writers in &options.writers {
            eprintln!("round {round} of {}: {writers} writers", options.rounds);
            let first = rand::random::<u32>();
            let wire = || trine::Proposals::new(at, u64::from(first));
            let ours = load::round(at, writers, options.length, wire).await?;
            samples.add("trine", writers, ours);
            if let Some(etcd) = theirs {
                let authority = etcd.leader.to_string();
                let wire = || grpc::Puts::new(&authority, value_bytes, rand::random());
                let theirs = load::round(etcd.leader, writers, options.length, wire).await?;
                samples.add("etcd", writers, theirs);
            }
        }
    }
    Ok(())
}

/// What was measured so far, by series.
#[derive(Default)]
struct Samples {
    latencies: BTreeMap<(usize, &'static str), Vec<f64>>,
    rates: BTreeMap<(usize, &'static str), Vec<f64>>,
    fdatasync_ms: Vec<f64>,
}

impl Samples {
    fn add(&mut self, who: &'static str, writers: usize, round: load::Round) {
        self.latencies.entry((writers, who)).or_default().extend(round.latencies_ms);
        self.rates.entry((writers, who)).or_default().push(round.rate);
    }

    fn fdatasync(&mut self, directory: &Path) -> Result<()> {
        let path = directory.join("fdatasync");
        let mut file = std::fs::File::options().create(true).append(true).open(path)?;
        for _ in 0..FDATASYNCS {
            let start = Instant::now();
            file.write_all(&[0; 512])?;
            file.sync_data()?;
            self.fdatasync_ms.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    }

    fn figures(self, options: &Options, etcd: Option<String>) -> Figures {
        let beside = match etcd {
            Some(version) => format!("Beside {version}."),
            None if options.alone => "Without etcd, as asked.".into(),
            None => "Without etcd: it is not installed (Debian: etcd-server).".into(),
        };
        let mut series: Vec<Series> =
            Series::new("fdatasync", "ms", self.fdatasync_ms).into_iter().collect();
        for ((writers, who), latencies) in self.latencies {
            series.extend(Series::new(&format!("{who}/{writers}/latency"), "ms", latencies));
        }
        for ((writers, who), rates) in self.rates {
            series.extend(Series::new(&format!("{who}/{writers}/rate"), "commits/s", rates));
        }
        let mut figures = Figures {
            bench: "raft".into(),
            method: format!(
                "{METHOD} {beside} {} rounds of {} ms.",
                options.rounds,
                options.length.as_millis()
            ),
            series,
            failures: 0,
        };
        for writers in &options.writers {
            for what in ["latency", "rate"] {
                let name = |who| format!("{who}/{writers}/{what}");
                figures.relate(&name("trine"), &name("etcd"));
            }
        }
        figures
    }
}

impl Addresses {
    /// The nodes' addresses.
    fn nodes(self) -> [IpAddr; 3] {
        [0, 1, 2].map(|index| IpAddr::V4(self.node_address(index)))
    }
}
