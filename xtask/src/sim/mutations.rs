//! Bugs that the simulator has to catch: each is one change of this tree's source, put into a copy
//! of it. A checker that lets one pass checks nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

/// Seeds that a bug may take to be caught.
const SEEDS: u64 = 2_000;

/// A bug.
struct Mutation {
    /// What it does.
    name: &'static str,
    /// In which file.
    file: &'static str,
    /// The text that is right; it occurs once.
    right: &'static str,
    /// What is put in its place.
    wrong: &'static str,
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "skip the flush of the log",
        file: "raft/src/wal/writer.rs",
        right: "        self.active.file.sync_data()?;
        self.active.offset",
        wrong: "        self.active.offset",
    },
    Mutation {
        name: "forget a truncation of the log",
        file: "raft/src/log_store.rs",
        right: "self.wal.submit(&[Record::Truncate(last_log_id)], None);",
        wrong: "",
    },
    Mutation {
        name: "forget a vote",
        file: "raft/src/log_store.rs",
        right: "self.durable(&[Record::Vote(*vote)]).await?;",
        wrong: "",
    },
    Mutation {
        name: "answer a read without waiting for its index",
        file: "raft/src/reads.rs",
        right: "if self.wait_applied(index, deadline).await {",
        wrong: "if self.wait_applied(0, deadline).await {",
    },
    Mutation {
        name: "drop the capacity check in apply",
        file: "controller/src/state/compute/apply.rs",
        right: "if let Some(shortage) = self.shortage(known, flavor, &Placed::default()) {",
        wrong: "if let Some(shortage) = None::<String> {",
    },
    Mutation {
        name: "drop the quota check in apply",
        file: "controller/src/state/compute/apply.rs",
        right: "self.quota.check(project, QuotaResource::Instances, 1)?;",
        wrong: "",
    },
    Mutation {
        name: "do not give back a server's quota",
        file: "controller/src/state/compute/apply.rs",
        right: "self.quota.release(&server.project_id, QuotaResource::Instances, 1);",
        wrong: "",
    },
    Mutation {
        name: "forget what commands came to",
        file: "controller/src/state/mod.rs",
        right: "self.outcomes.keep(index, command_id, &outcome);",
        wrong: "",
    },
    Mutation {
        name: "leave outcomes out of snapshots",
        file: "controller/src/state/mod.rs",
        right: "    pub outcomes: Outcomes,",
        wrong: "    #[serde(skip)]
    pub outcomes: Outcomes,",
    },
    Mutation {
        name: "keep a volume's generation when it is attached",
        file: "controller/src/state/volume/apply.rs",
        right: "        volume.generation += 1;
        volume.updated_ms = now;
        volume.status = if stopped",
        wrong: "        volume.updated_ms = now;
        volume.status = if stopped",
    },
    Mutation {
        name: "give a removed host's id again",
        file: "controller/src/state/cluster/apply.rs",
        right: "let id = HostId(self.cluster.next_host_id);",
        wrong: "let id = HostId(self.cluster.hosts.len() as u64 + 1);",
    },
    Mutation {
        name: "act on a state that may be a replayed one",
        file: "controller/src/plan/agent.rs",
        right: "(true, Gate::NoLeader) => self.gate = Gate::Shut,",
        wrong: "(true, Gate::NoLeader) => self.gate = Gate::Open,",
    },
    Mutation {
        name: "fence a host while its lease may still run",
        file: "controller/src/plan/leases.rs",
        right: "let old = |at: &Duration| now.saturating_sub(*at) >= LEASE + MARGIN;",
        wrong: "let old = |at: &Duration| now.saturating_sub(*at) >= MARGIN;",
    },
    Mutation {
        name: "count a lease before its state has come",
        file: "controller/src/plan/leases.rs",
        right: "self.grants.iter().filter(|(index, _)| *index <= applied);",
        wrong: "self.grants.iter().filter(|_| true);",
    },
    Mutation {
        name: "take a guest of an older generation for the wanted one",
        file: "controller/src/plan/steps.rs",
        right: "(Some(guest), _) if guest.generation < view.generation => {",
        wrong: "(Some(guest), _) if guest.generation > view.generation => {",
    },
];

/// Runs the mutations whose name holds `only`.
pub(super) fn run(only: &str, seeds: Option<u64>) -> Result<()> {
    let seeds = seeds.unwrap_or(SEEDS);
    let tree = shell::target_directory().join("mutations");
    copy_tree(&tree)?;
    ensure!(!caught(&tree, seeds.min(200))?.0, "the tree itself fails: mutate nothing");
    let chosen = MUTATIONS.iter().filter(|mutation| mutation.name.contains(only));
    let mut survived = Vec::new();
    for mutation in chosen {
        let right = fs::read_to_string(tree.join(mutation.file))?;
        fs::write(tree.join(mutation.file), mutation.apply(&right)?)?;
        let result = caught(&tree, seeds);
        fs::write(tree.join(mutation.file), right)?;
        let (caught, how, took) = result.with_context(|| mutation.name)?;
        println!("{:45} {:8} {:>6.1} s  {how}", mutation.name, verdict(caught), took.as_secs_f64());
        if !caught {
            survived.push(mutation.name);
        }
    }
    if !survived.is_empty() {
        bail!("not caught within {seeds} seeds: {}", survived.join("; "));
    }
    Ok(())
}

fn verdict(caught: bool) -> &'static str {
    if caught { "caught" } else { "SURVIVED" }
}

impl Mutation {
    /// The file with the bug in it.
    fn apply(&self, text: &str) -> Result<String> {
        let count = text.matches(self.right).count();
        ensure!(
            count == 1,
            "mutation \"{}\": {} holds its text {count} times, not once",
            self.name,
            self.file
        );
        Ok(text.replacen(self.right, self.wrong, 1))
    }
}

/// Copies what git knows of this tree; files that are as they were keep their time, so that
/// little is built again, and those that are no longer in this tree go.
fn copy_tree(to: &Path) -> Result<()> {
    let list = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
    let files = shell::output(Command::new("git").args(list).current_dir(shell::root()))?;
    let mut kept = BTreeSet::new();
    for file in files.split('\0').filter(|file| !file.is_empty()) {
        let (from, to) = (shell::root().join(file), to.join(file));
        let Ok(content) = fs::read(&from) else { continue };
        kept.insert(to.clone());
        if fs::read(&to).is_ok_and(|old| old == content) {
            continue;
        }
        let parent = to.parent().context("a file lies in a directory")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
    }
    remove_others(to, &kept, &to.join("target"))
}

/// Removes files below `directory` that are not `kept`, but for those in `except`.
fn remove_others(directory: &Path, kept: &BTreeSet<PathBuf>, except: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if path != except {
                remove_others(&path, kept, except)?;
            }
        } else if !kept.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Whether the simulator of `tree` finds something, and what.
fn caught(tree: &Path, seeds: u64) -> Result<(bool, String, Duration)> {
    let simulator = super::build(tree, &tree.join("target"))?;
    let start = Instant::now();
    let output = Command::new(&simulator)
        .args(["--seed", "0", "--seeds", &seeds.to_string()])
        .output()
        .with_context(|| format!("cannot start {}", simulator.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let finding = text.lines().find(|line| line.contains(" FOUND "));
    let how = finding.map_or_else(|| output.status.to_string(), str::to_owned);
    Ok((!output.status.success(), how, start.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutation_still_applies() {
        for mutation in MUTATIONS {
            let path = shell::root().join(mutation.file);
            let text = fs::read_to_string(&path).expect("a mutation names a file of this tree");
            let wrong = mutation.apply(&text).expect("its text occurs once");
            assert_ne!(text, wrong, "{}", mutation.name);
        }
    }

    #[test]
    fn there_are_enough_and_no_two_are_the_same() {
        let mut names: Vec<_> = MUTATIONS.iter().map(|mutation| mutation.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MUTATIONS.len());
        assert!(names.len() >= 8);
    }
}
