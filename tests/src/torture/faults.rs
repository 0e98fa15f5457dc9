//! What goes wrong, and when: rounds of faults that a seed decides.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use rustix::process::Signal;

use super::host::{Host, Role};
use super::wire::{Link, Wire};
use super::{HOSTS, clock};
use crate::random::Random;

/// One thing that goes wrong. Hosts are 0 to 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// kill -9; a node is started again when the fault ends, the others by their node.
    Kill(usize, Role),
    /// All nodes at once: no quorum.
    KillNodes,
    /// SIGSTOP, until the fault ends.
    Stop(usize, Role),
    /// The host is cut off, both ways.
    Isolate(usize),
    /// Nothing the host sends arrives.
    Mute(usize),
    /// Nothing arrives at the host.
    Deafen(usize),
    /// Two hosts don't reach each other; both reach the third.
    CutBetween(usize, usize),
    /// One host doesn't reach another, one way.
    CutOneWay(usize, usize),
    /// Every link loses frames.
    Lose(u64),
    /// A host's links are late, by up to so many milliseconds a frame, out of order.
    Delay(usize, u64),
    /// Every link doubles frames.
    Duplicate(u64),
    /// A host's disk is full.
    FillDisk(usize),
    /// A host's wall clock is wrong by so many seconds.
    Clock(usize, i64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |index: usize| index + 1;
        match *self {
            Fault::Kill(at, role) => write!(f, "kill -9 {} of host{}", role.name(), host(at)),
            Fault::KillNodes => write!(f, "kill -9 all nodes"),
            Fault::Stop(at, role) => write!(f, "SIGSTOP {} of host{}", role.name(), host(at)),
            Fault::Isolate(at) => write!(f, "cut off host{}", host(at)),
            Fault::Mute(at) => write!(f, "host{} can't send", host(at)),
            Fault::Deafen(at) => write!(f, "host{} can't receive", host(at)),
            Fault::CutBetween(a, b) => write!(f, "cut host{} and host{}", host(a), host(b)),
            Fault::CutOneWay(a, b) => write!(f, "cut host{} to host{}", host(a), host(b)),
            Fault::Lose(percent) => write!(f, "lose {percent} % of all frames"),
            Fault::Delay(at, ms) => write!(f, "delay host{} by up to {ms} ms", host(at)),
            Fault::Duplicate(percent) => write!(f, "double {percent} % of all frames"),
            Fault::FillDisk(at) => write!(f, "fill the disk of host{}", host(at)),
            Fault::Clock(at, s) => write!(f, "set the clock of host{} {s:+} s off", host(at)),
        }
    }
}

/// A fault in its round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    /// From the start of the round.
    pub(super) after: Duration,
    /// How long it lasts.
    pub(super) lasts: Duration,
    pub(super) fault: Fault,
}

/// The faults of one round, which depend on nothing but seed and number.
pub(super) fn round(seed: u64, number: u64) -> Vec<Planned> {
    let mut random = Random::new(seed ^ number.wrapping_mul(0xA076_1D64_78BD_642F));
    let count = *random.pick(&[1, 1, 2, 2, 3]);
    let mut planned: Vec<Planned> = Vec::new();
    while planned.len() < count {
        let next = Planned {
            after: Duration::from_millis(random.between(0, 4000)),
            lasts: Duration::from_millis(random.between(500, 14_000)),
            fault: fault(&mut random),
        };
        if planned.iter().all(|other| goes_with(other.fault, next.fault)) {
            planned.push(next);
        }
    }
    planned
}

fn fault(random: &mut Random) -> Fault {
    let at = random.below(HOSTS as u64) as usize;
    let other = (at + random.between(1, HOSTS as u64 - 1) as usize) % HOSTS;
    let role = *random.pick(&[Role::Node, Role::Node, Role::Switch, Role::Storage]);
    match random.below(20) {
        0..=3 => Fault::Kill(at, role),
        4 => Fault::KillNodes,
        5..=7 => Fault::Stop(at, role),
        8..=9 => Fault::Isolate(at),
        10 => Fault::Mute(at),
        11 => Fault::Deafen(at),
        12 => Fault::CutBetween(at, other),
        13 => Fault::CutOneWay(at, other),
        14 => Fault::Lose(random.between(2, 30)),
        15 => Fault::Delay(at, random.between(20, 400)),
        16 => Fault::Duplicate(random.between(5, 50)),
        17..=18 => Fault::FillDisk(at),
        _ if clock::library().is_none() => Fault::Kill(at, role),
        _ => Fault::Clock(at, random.between(0, 240) as i64 - 120),
    }
}

/// Two faults of one kind at one place would end each other.
fn goes_with(a: Fault, b: Fault) -> bool {
    let process = |fault| match fault {
        Fault::Kill(at, role) | Fault::Stop(at, role) => Some((at, role)),
        _ => None,
    };
    let kills_nodes = |fault| fault == Fault::KillNodes;
    let node = |fault| process(fault).is_some_and(|(_, role)| role == Role::Node);
    if (kills_nodes(a) && (node(b) || kills_nodes(b))) || (kills_nodes(b) && node(a)) {
        return false;
    }
    if process(a).is_some() && process(a) == process(b) {
        return false;
    }
    if is_of_wire(a) && is_of_wire(b) {
        return false;
    }
    std::mem::discriminant(&a) != std::mem::discriminant(&b) || process(a).is_some()
}

fn is_of_wire(fault: Fault) -> bool {
    !matches!(
        fault,
        Fault::Kill(..)
            | Fault::KillNodes
            | Fault::Stop(..)
            | Fault::FillDisk(_)
            | Fault::Clock(..)
    )
}

/// Lets a fault begin.
pub(super) fn begin(fault: Fault, hosts: &mut [Host], wire: &Wire) -> Result<()> {
    match fault {
        Fault::Kill(at, role) => hosts[at].signal(role, Signal::KILL).map(drop),
        Fault::KillNodes => {
            hosts.iter().try_for_each(|host| host.signal(Role::Node, Signal::KILL).map(drop))
        }
        Fault::Stop(at, role) => hosts[at].signal(role, Signal::STOP).map(drop),
        Fault::FillDisk(at) => hosts[at].fill_disk(),
        Fault::Clock(at, seconds) => hosts[at].clock.set(seconds),
        of_wire => {
            for from in 0..HOSTS {
                for to in (0..HOSTS).filter(|to| *to != from) {
                    wire.change(from, to, |link| worsen(link, of_wire, from, to));
                }
            }
            Ok(())
        }
    }
}

fn worsen(link: &mut Link, fault: Fault, from: usize, to: usize) {
    let cut = match fault {
        Fault::Isolate(at) => from == at || to == at,
        Fault::Mute(at) => from == at,
        Fault::Deafen(at) => to == at,
        Fault::CutBetween(a, b) => (from, to) == (a, b) || (from, to) == (b, a),
        Fault::CutOneWay(a, b) => (from, to) == (a, b),
        _ => false,
    };
    link.cut |= cut;
    match fault {
        Fault::Lose(percent) => link.loss_percent = percent,
        Fault::Duplicate(percent) => link.duplicate_percent = percent,
        Fault::Delay(at, ms) if from == at || to == at => link.delay_ms_max = ms,
        _ => {}
    }
}

/// Ends a fault.
pub(super) fn end(fault: Fault, hosts: &mut [Host], wire: &Wire) -> Result<()> {
    match fault {
        Fault::Kill(at, Role::Node) => hosts[at].start_node(),
        Fault::Kill(..) => Ok(()),
        Fault::KillNodes => hosts.iter_mut().try_for_each(Host::start_node),
        Fault::Stop(at, role) => hosts[at].signal(role, Signal::CONT).map(drop),
        Fault::FillDisk(at) => hosts[at].free_disk(),
        Fault::Clock(at, _) => hosts[at].clock.set(0),
        _ => {
            wire.heal();
            Ok(())
        }
    }
}

/// Ends every fault there may be.
pub(super) fn heal(hosts: &mut [Host], wire: &Wire) -> Result<()> {
    wire.heal();
    for host in hosts {
        host.free_disk()?;
        host.clock.set(0)?;
        for role in Role::ALL {
            host.signal(role, Signal::CONT)?;
        }
        host.start_node()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_rounds_and_another_has_others() {
        let rounds = |seed| (0..50).map(|number| round(seed, number)).collect::<Vec<_>>();
        assert_eq!(rounds(1), rounds(1));
        assert_ne!(rounds(1), rounds(2));
    }

    #[test]
    fn no_round_has_two_faults_that_end_each_other() {
        for number in 0..5000 {
            let planned = round(3, number);
            assert!((1..=3).contains(&planned.len()));
            let of_wire = planned.iter().filter(|planned| is_of_wire(planned.fault));
            assert!(of_wire.count() <= 1, "{planned:?}");
            for (n, a) in planned.iter().enumerate() {
                assert!(planned[..n].iter().all(|b| goes_with(a.fault, b.fault)), "{planned:?}");
            }
        }
    }

    #[test]
    fn every_kind_of_fault_comes_up() {
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..500 {
            for planned in round(4, number) {
                seen.insert(format!("{:?}", std::mem::discriminant(&planned.fault)));
            }
        }
        let expected = if clock::library().is_some() { 13 } else { 12 };
        assert_eq!(seen.len(), expected);
    }
}
