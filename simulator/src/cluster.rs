//! The cluster as a whole: what faults and the end of a run do to it.

use std::time::Duration;

use controller::ids::HostId;
use controller::state::Command;

use raft::sim::{Link, Loss};

use crate::checks::{leaked, unsettled};
use crate::consensus::{Keeping, Node};
use crate::hardware::Hardware;
use crate::world::World;
use crate::{host, runtime, setup};

/// Longest that the cluster may take to settle once nothing goes wrong any more.
const SETTLE_MAX: Duration = Duration::from_secs(120);

/// A cluster. Clones are the same.
#[derive(Clone)]
pub(crate) struct Cluster {
    world: World,
    keeping: Keeping,
    hosts: u64,
}

impl Cluster {
    /// Machines that are on, without nodes.
    pub(crate) fn new(world: &World, hosts: u64, keeping: Keeping) -> Cluster {
        let image = setup::content();
        world.with(|shared| {
            for id in (1..=hosts).map(HostId) {
                shared.hosts.insert(id, Hardware::new(runtime::now(), Some(&image)));
            }
        });
        Cluster { world: world.clone(), keeping, hosts }
    }

    /// What it shares with everybody.
    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// How many hosts there are.
    pub(crate) fn hosts(&self) -> u64 {
        self.hosts
    }

    /// Starts all nodes and makes the cloud that clients find.
    pub(crate) async fn form(&self) -> Result<(), String> {
        for id in (1..=self.hosts).map(HostId) {
            self.start(id);
        }
        self.wait_for_nodes().await?;
        let first = self.world.node(HostId(1)).ok_or("node 1 isn't there")?.raft;
        let (one, hosts) = (first.clone(), self.hosts);
        let formed = first.within(async move {
            one.bootstrap().await?;
            for id in (2..=hosts).map(HostId) {
                one.add(id).await?;
            }
            Ok::<(), String>(())
        });
        formed.await.ok_or("node 1 died")??;
        let mut commands = vec![setup::init()];
        commands.extend((2..=self.hosts).flat_map(|id| setup::admit(HostId(id), None)));
        commands.extend(setup::commands(self.hosts));
        for command in commands {
            self.must(command).await?;
        }
        Ok(())
    }

    async fn wait_for_nodes(&self) -> Result<(), String> {
        for _ in 0..50 {
            runtime::sleep(Duration::from_millis(100)).await;
            let running = self.world.with(|shared| shared.nodes.len() as u64);
            if running == self.hosts {
                return Ok(());
            }
        }
        Err("the nodes don't start".into())
    }

    async fn must(&self, command: Command) -> Result<(), String> {
        let node = self.world.node(HostId(1)).ok_or("node 1 isn't there")?;
        let id = self.world.id();
        let proposed = node.raft.propose_for(id, command.encode()).await;
        let proposed = proposed.ok_or("the first commands have no answer")?;
        let result = controller::state::decode_result(&proposed.outcome);
        match result.map_err(|error| error.to_string())? {
            Ok(_) => Ok(()),
            Err(why) => Err(format!("{command:?}: {why}")),
        }
    }

    /// Starts a node, where its host is on and has none.
    pub(crate) fn start(&self, id: HostId) {
        let on = self.world.host(id, |hardware| hardware.powered) == Some(true);
        if on && self.world.node(id).is_none() {
            host::start_node(&self.world, id, self.keeping);
        }
    }

    /// Kills a node; what it wrote stays in its host's memory.
    pub(crate) fn kill(&self, id: HostId) {
        host::kill_node(&self.world, id, Loss::Nothing);
    }

    /// Kills a node and flips a bit in its log. Peers can give back what one node lost, so it is
    /// always the same one, and none where a host is replaced: then the others are too few.
    pub(crate) fn damage_log(&self, id: HostId) {
        let only = self.world.with(|shared| {
            (!shared.replacing && *shared.damaged.get_or_insert(id) == id).then_some(id)
        });
        let Some(id) = only else { return };
        self.kill(id);
        let disk = runtime::sim().node(id.0).disk();
        let mut segments: Vec<_> = disk.paths().into_iter().map(|(path, _)| path).collect();
        segments.retain(|path| path.extension().is_some_and(|extension| extension == "wal"));
        if segments.is_empty() {
            return;
        }
        let path = self.world.with(|shared| shared.random.pick(&segments).clone());
        let at = self.world.between(0, u64::from(u32::MAX));
        disk.damage(&path, |bytes| {
            let written = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
            let bit = usize::try_from(at).unwrap_or(0) % (written * 8);
            if let Some(byte) = bytes.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
        });
        self.world.note(format_args!("a bit of {} on host {id} flips", path.display()));
    }

    /// Asks whoever leads to let a node lead.
    pub(crate) fn move_leader(&self, to: HostId) {
        for node in self.nodes().into_iter().filter(|node| node.leads().is_some()) {
            runtime::spawn(async move { node.transfer(to).await });
        }
    }

    /// The nodes that run.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        self.world.with(|shared| shared.nodes.values().map(|node| node.raft.clone()).collect())
    }

    /// A host is gone for good.
    pub(crate) fn retire(&self, id: HostId) {
        self.power_off(id);
        self.world.with(|shared| shared.hosts.remove(&id));
    }

    /// A new host, without anything on it.
    pub(crate) fn put_up(&self, id: HostId) {
        let hardware = Hardware::new(runtime::now(), None);
        self.world.with(|shared| shared.hosts.insert(id, hardware));
        self.start(id);
    }

    /// Cuts a host's power.
    pub(crate) fn power_off(&self, id: HostId) {
        let loss = match self.world.between(0, 3) {
            0 => Loss::All,
            1 => Loss::Prefix,
            _ => Loss::Random,
        };
        host::kill_node(&self.world, id, loss);
        self.world.host(id, Hardware::power_off);
    }

    /// Gives a host its power back.
    pub(crate) fn power_on(&self, id: HostId) {
        self.world.host(id, |hardware| {
            if !hardware.powered {
                hardware.power_on(runtime::now());
            }
        });
        self.start(id);
    }

    /// Cuts what goes from `a` to `b`, and back.
    pub(crate) fn cut(&self, a: HostId, b: HostId, there: bool, back: bool) {
        let cut = |from: HostId, to: HostId| {
            let mut link = runtime::sim().link(from.0, to.0);
            link.cut = true;
            runtime::sim().set_link(from.0, to.0, link);
            self.world.with(|shared| shared.cut.insert((from, to)));
        };
        if there {
            cut(a, b);
        }
        if back {
            cut(b, a);
        }
    }

    /// From now on what goes between a host and the others comes late, twice or not at all.
    pub(crate) fn make_links_poor(&self, host: HostId) {
        let poor = Link {
            delay_min: Duration::from_millis(1),
            delay_max: Duration::from_millis(self.world.between(5, 120)),
            loss_per_mille: u32::try_from(self.world.between(0, 80)).unwrap_or(0),
            twice_per_mille: u32::try_from(self.world.between(0, 80)).unwrap_or(0),
            break_per_mille: u32::try_from(self.world.between(0, 15)).unwrap_or(0),
            ..Link::default()
        };
        for other in (1..=self.hosts).map(HostId).filter(|other| *other != host) {
            for (from, to) in [(host, other), (other, host)] {
                let cut = runtime::sim().link(from.0, to.0).cut;
                runtime::sim().set_link(from.0, to.0, Link { cut, ..poor.clone() });
            }
        }
    }

    /// All links of a host are well again.
    pub(crate) fn mend(&self, host: HostId) {
        for other in (1..=self.hosts).map(HostId) {
            runtime::sim().set_link(host.0, other.0, Link::default());
            runtime::sim().set_link(other.0, host.0, Link::default());
        }
        self.world.with(|shared| shared.cut.retain(|(a, b)| *a != host && *b != host));
    }

    /// Waits until what is wanted is what is, on every host.
    pub(crate) async fn settle(&self) -> Result<(), String> {
        let until = runtime::now() + SETTLE_MAX;
        let mut why = String::new();
        while runtime::now() < until {
            runtime::sleep(Duration::from_millis(500)).await;
            match self.still_to_do() {
                None => return Ok(()),
                Some(what) => why = what,
            }
        }
        Err(format!("not settled {} s after the last fault: {why}", SETTLE_MAX.as_secs()))
    }

    /// The replacement of a host is complete.
    pub(crate) fn replaced(&self) {
        self.world.with(|shared| shared.replacing = false);
    }

    fn still_to_do(&self) -> Option<String> {
        self.world.with(|shared| {
            if shared.clients > 0 {
                return Some(format!("{} clients wait for an answer", shared.clients));
            }
            if shared.replacing {
                return Some("a host is being replaced".into());
            }
            let newest = shared.checks.newest();
            for (id, hardware) in &shared.hosts {
                let Some(node) = shared.nodes.get(id) else { return Some(format!("no node {id}")) };
                let applied = node.raft.applied();
                if applied < newest.applied_index {
                    return Some(format!(
                        "node {id} has applied {applied} of {}",
                        newest.applied_index
                    ));
                }
                let here = unsettled(&newest, *id, hardware);
                let here = here.or_else(|| leaked(&newest, *id, hardware));
                if here.is_some() {
                    return here;
                }
            }
            None
        })
    }

    /// Every node's own state.
    pub(crate) fn states(&self) -> Vec<(HostId, controller::state::State)> {
        self.world
            .with(|shared| shared.nodes.iter().map(|(id, node)| (*id, node.raft.view())).collect())
    }
}
