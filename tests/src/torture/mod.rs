//! Torture: three real nodes on three hosts made of namespaces, joined by a wire of our own, under faults
//! that a seed decides, while clients of all nodes make, join, change and remove things.
//!
//! ```text
//!   clients of node 1      clients of node 2      clients of node 3     (seat, registers, objects)
//!        │                      │                      │
//!   ┌─ host1 ─────────┐    ┌─ host2 ─────────┐    ┌─ host3 ─────────┐   (host: PID, mount and
//!   │ node            │    │ node            │    │ node            │    network namespace,
//!   │ switch  storage │    │ switch  storage │    │ switch  storage │    a disk of its own)
//!   │ witness, guests │    │ witness, guests │    │ witness, guests │
//!   └────── wire0 ────┘    └────── wire0 ────┘    └────── wire0 ────┘
//!              └───────────────────┴──────────────────────┘
//!                     wire: cuts, loses, delays, doubles
//! ```
//!
//! Faults come in rounds; after each all is healed, and every node must serve again. At the end the
//! history of every field and name is linearizable, every acknowledged change is there, nothing is under
//! way for ever, the witnesses (guests that only faults of the cloud could harm) ran through it
//! all with every write that they were told to be durable, and nothing is left over. What a run
//! made ends with this process, however that ends.

mod api;
mod checks;
mod clock;
mod faults;
mod ground;
mod host;
mod journal;
mod objects;
mod registers;
mod seat;
mod tap;
mod wire;
mod witnesses;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::random::Random;
use api::Reply;
use ground::{Ground, Made};
use journal::Journal;
use objects::Builder;
use registers::Field;
use seat::Seat;
use witnesses::Witness;

/// Hosts of the cloud.
const HOSTS: usize = 3;
/// How soon every node must take writes after the faults of a round.
const SERVES_WITHIN: Duration = Duration::from_secs(60);
/// Number of the client that looks whether nodes serve, in the history.
const PROBE: usize = 99;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The product's executable.
    pub trine: PathBuf,
    /// How long faults go on.
    pub duration: Duration,
    /// Decides faults and clients' choices.
    pub seed: u64,
    /// Leaves logs and disks even where nothing was found.
    pub keep: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// What must not be; empty where all is well.
    pub findings: Vec<String>,
    /// Counts of rounds, faults, requests and operations; times in seconds.
    pub figures: Value,
    /// Where logs, disks and the schedule lie, if they were kept.
    pub directory: PathBuf,
}

/// What this machine lacks for a run, in words; `None` where it lacks nothing.
pub fn lacks() -> Option<String> {
    ground::lacks()
}

/// Whether clocks can be made to jump here (libfaketime is installed).
pub fn clocks_jump() -> bool {
    clock::library().is_some()
}

/// Makes the cloud, tortures it, and checks what must hold.
///
/// # Errors
/// Where the run itself failed; what it found out is in the report.
pub fn run(options: &Options) -> Result<Report> {
    if let Some(lack) = lacks() {
        bail!("{lack}");
    }
    let mut ground = Ground::make(&options.trine, options.seed)?;
    let directory = ground.directory.clone();
    let result = torture(options, &mut ground);
    if options.keep || !result.as_ref().is_ok_and(|(findings, _)| findings.is_empty()) {
        ground.keep();
    }
    let (findings, figures) =
        result.with_context(|| format!("seed {}; see {}", options.seed, directory.display()))?;
    Ok(Report { findings, figures, directory })
}

fn torture(options: &Options, ground: &mut Ground) -> Result<(Vec<String>, Value)> {
    let mut run = Run::prepare(options, ground)?;
    run.rounds(ground)?;
    run.finish(ground)?;
    let figures = run.figures();
    Ok((run.findings, figures))
}

/// A run, from the first guest on.
struct Run<'a> {
    options: &'a Options,
    start: Instant,
    log: std::fs::File,
    journal: Arc<Journal>,
    made: Arc<Made>,
    fields: Arc<Vec<Field>>,
    seats: Vec<Seat>,
    clients: Vec<JoinHandle<()>>,
    witnesses: Vec<Witness>,
    findings: Vec<String>,
    /// A node does not serve in peace: further rounds would tell nothing.
    is_out_of_service: bool,
    /// Faults by kind.
    faults: BTreeMap<String, u64>,
    rounds: u64,
    recoveries: Vec<Duration>,
    witnessed: u64,
}

impl<'a> Run<'a> {
    fn prepare(options: &'a Options, ground: &mut Ground) -> Result<Run<'a>> {
        ground.make_cluster()?;
        let seats = ground.seats()?;
        ground.wait_for_voters()?;
        let made = ground.make_catalog(&options.trine, &seats[0])?;
        let witnesses = witnesses::start(ground, &seats[0], &made, options.duration)?;
        let first = &witnesses[0];
        let fields = ground::make_fields(&seats[0], &made, &first.server, &first.volume)?;
        let mut run = Run {
            options,
            start: Instant::now(),
            log: std::fs::File::create(ground.directory.join("schedule.log"))?,
            journal: Arc::new(Journal::new()),
            made: Arc::new(made),
            fields: Arc::new(fields),
            seats,
            clients: Vec::new(),
            witnesses,
            findings: Vec::new(),
            is_out_of_service: false,
            faults: BTreeMap::new(),
            rounds: 0,
            recoveries: Vec::new(),
            witnessed: 0,
        };
        run.write_initial()?;
        run.start_clients();
        run.say(&format!("seed {}: three nodes serve, {HOSTS} witnesses run", options.seed));
        Ok(run)
    }

    /// Every register begins as the model says.
    fn write_initial(&self) -> Result<()> {
        for field in self.fields.iter() {
            let field = field.clone();
            let (api, journal) = (self.seats[0].api.clone(), Arc::new(Journal::new()));
            let reply = self.seats[0].run(async move {
                let value = registers::INITIAL.to_owned();
                Ok(registers::write(PROBE, &api, &journal, &field, value).await)
            })?;
            if !matches!(reply, Reply::Answer(0..300, _)) {
                bail!("a field could not be set: {reply:?}");
            }
        }
        Ok(())
    }

    fn start_clients(&mut self) {
        let mut random = Random::new(self.options.seed ^ 0x5EED);
        for (number, seat) in self.seats.iter().enumerate() {
            let mut random = || Random::new(random.draw());
            let (api, journal) = (|| seat.api.clone(), || Arc::clone(&self.journal));
            for client in [number * 10, number * 10 + 1] {
                let fields = Arc::clone(&self.fields);
                self.clients.push(seat.spawn(registers::fields(
                    client,
                    api(),
                    journal(),
                    fields,
                    random(),
                )));
            }
            let slots = registers::slots(number * 10 + 2, api(), journal(), random());
            self.clients.push(seat.spawn(slots));
            let made = Arc::clone(&self.made);
            let builder = Builder::new(number * 10 + 3, api(), journal(), made, random());
            self.clients.push(seat.spawn(builder.work()));
        }
    }

    fn say(&mut self, what: &str) {
        let line = format!("{:8.3} s  {what}", self.start.elapsed().as_secs_f64());
        println!("{line}");
        let _ = writeln!(self.log, "{line}");
    }

    fn rounds(&mut self, ground: &mut Ground) -> Result<()> {
        while self.start.elapsed() < self.options.duration {
            self.say(&format!("round {}", self.rounds));
            self.round(ground)?;
            self.rounds += 1;
            if self.is_out_of_service {
                break;
            }
        }
        Ok(())
    }

    /// The faults of one round, then peace until every node serves and every witness is well.
    fn round(&mut self, ground: &mut Ground) -> Result<()> {
        let begun = Instant::now();
        let planned = faults::round(self.options.seed, self.rounds);
        let mut events: Vec<(Duration, bool, faults::Fault)> = Vec::new();
        for one in &planned {
            events.push((one.after, true, one.fault));
            events.push((one.after + one.lasts, false, one.fault));
            let kind = format!("{:?}", one.fault);
            let kind = kind.split('(').next().unwrap_or_default().to_owned();
            *self.faults.entry(kind).or_default() += 1;
        }
        events.sort_by_key(|(at, ..)| *at);
        for (at, begins, fault) in events {
            std::thread::sleep(at.saturating_sub(begun.elapsed()));
            self.say(&format!("  {}: {fault}", if begins { "begin" } else { "end" }));
            if begins {
                faults::begin(fault, &mut ground.hosts, &ground.wire)?;
            } else {
                faults::end(fault, &mut ground.hosts, &ground.wire)?;
            }
        }
        faults::heal(&mut ground.hosts, &ground.wire)?;
        self.expect_service()?;
        self.examine_guests(ground)
    }

    /// Every node takes a write within a limit.
    fn expect_service(&mut self) -> Result<()> {
        let healed = Instant::now();
        for number in 0..self.seats.len() {
            while let Some(why) = self.probe(number)? {
                if healed.elapsed() > SERVES_WITHIN {
                    let limit = SERVES_WITHIN.as_secs();
                    let host = number + 1;
                    let finding =
                        format!("host{host} takes no write {limit} s after healing: {why}");
                    self.tell(vec![finding]);
                    self.is_out_of_service = true;
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        self.recoveries.push(healed.elapsed());
        self.say(&format!(
            "  all nodes serve {:.2} s after healing",
            healed.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// Writes to a register through a node; why not, if not.
    fn probe(&self, number: usize) -> Result<Option<String>> {
        let (api, journal) = (self.seats[number].api.clone(), Arc::clone(&self.journal));
        let field = self.fields[0].clone();
        self.seats[number].run(async move {
            let value = format!("probe-{number}-{}", journal.now());
            Ok(match registers::write(PROBE, &api, &journal, &field, value).await {
                Reply::Answer(..) => None,
                Reply::NotSent(why) | Reply::Lost(why) => Some(why),
            })
        })
    }

    fn examine_guests(&mut self, ground: &Ground) -> Result<()> {
        let found = patiently(|| checks::running_twice(ground))?;
        self.tell(found);
        for number in 0..self.witnesses.len() {
            if self.witnesses[number].harmed {
                continue;
            }
            let witness = &self.witnesses[number];
            let found = patiently(|| witness.examine(ground, &self.seats[0]))?;
            self.witnesses[number].harmed = !found.is_empty();
            self.tell(found);
        }
        Ok(())
    }

    /// Peace, then everything that must hold.
    fn finish(&mut self, ground: &mut Ground) -> Result<()> {
        self.journal.stop();
        for client in std::mem::take(&mut self.clients) {
            self.seats[0].run(async move { Ok(client.await?) })?;
        }
        self.say("the clients have stopped; waiting until nothing is under way");
        let mut found = Vec::new();
        let shown = checks::settle(&self.seats[1], &self.made, &mut found)?;
        let disks_were_full = self.faults.contains_key("FillDisk");
        found.extend(checks::promises(&self.journal, &shown, disks_were_full));
        found.append(&mut self.journal.entries().findings);
        self.tell(found);
        self.say("checking the histories");
        let found = checks::histories(&self.journal);
        self.tell(found);
        self.say("waiting for the witnesses' next writes");
        let found = self.progress()?;
        self.tell(found);
        self.say("removing everything");
        let found = self.remove(ground)?;
        self.tell(found);
        Ok(())
    }

    fn tell(&mut self, findings: Vec<String>) {
        for finding in findings {
            self.say(&format!("FOUND {finding}"));
            self.findings.push(finding);
        }
    }

    /// Removes what the clients left, and says what does not go.
    fn remove(&mut self, ground: &mut Ground) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        let seat = &self.seats[2];
        let rounds: Result<Vec<u64>> =
            self.witnesses.iter().map(|witness| witness.round(seat)).collect();
        checks::remove_servers(seat, &self.made, &mut findings)?;
        for (witness, round) in self.witnesses.iter().zip(rounds?) {
            self.witnessed += round;
            findings.extend(witness.compare(ground, round)?);
        }
        checks::remove_volumes(seat, &self.made, &mut findings)?;
        findings.extend(checks::leftovers(ground)?);
        for host in &mut ground.hosts {
            if let Err(error) = host.stop() {
                findings.push(format!("{error:#}"));
            }
        }
        Ok(findings)
    }

    /// Every witness goes on writing.
    fn progress(&self) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        let limit = SERVES_WITHIN + self.options.duration / 60;
        for witness in self.witnesses.iter().filter(|witness| !witness.harmed) {
            let (begun, first) = (Instant::now(), witness.round(&self.seats[0])?);
            while witness.round(&self.seats[0])? == first {
                if begun.elapsed() > limit {
                    findings.push(format!(
                        "the witness on host{} has written nothing for {} s, after round {first}",
                        witness.host + 1,
                        limit.as_secs()
                    ));
                    break;
                }
                std::thread::sleep(Duration::from_millis(300));
            }
        }
        Ok(findings)
    }

    fn figures(&self) -> Value {
        let entries = self.journal.entries();
        let recoveries: Vec<f64> = self.recoveries.iter().map(Duration::as_secs_f64).collect();
        json!({
            "seed": self.options.seed,
            "seconds": self.start.elapsed().as_secs(),
            "rounds": self.rounds,
            "faults": self.faults,
            "requests": entries.counts(),
            "refusals": entries.refusals(),
            "operations_checked": entries.registers.len() + entries.slots.len(),
            "servers": entries.book.servers.len(),
            "volumes": entries.book.volumes.len(),
            "witness_writes": self.witnessed,
            "serves_after_healing_s": recoveries,
        })
    }
}

/// Looks again where it can't: a node that has just started again may not have found its guests yet.
fn patiently<T>(look: impl Fn() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match look() {
            Err(_) if begun.elapsed() < SERVES_WITHIN => {
                std::thread::sleep(Duration::from_millis(200));
            }
            found => return found,
        }
    }
}
