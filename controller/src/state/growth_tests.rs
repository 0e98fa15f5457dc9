//! The cost of a command doesn't grow with the number of objects.

use super::compute::ComputeCommand;
use super::fixture::{PROJECT, Sample, flavor, new_network, new_server, new_subnet};
use super::identity::{IdentityCommand, NewProject};
use super::network::NetworkCommand;
use super::{Command, QuotaCommand, QuotaResource, State};
use crate::ids::HostId;

/// Objects of each kind; a walk over all of them would make the last ones many times dearer.
const OBJECTS: usize = 6_000;
/// The first and the last tenth are compared.
const CHUNKS: usize = 10;

fn project(n: usize) -> Command {
    Command::Identity(IdentityCommand::CreateProject(NewProject {
        id: format!("p{n}").into(),
        domain_id: "default".into(),
        parent_id: None,
        name: format!("project{n}"),
        description: String::new(),
        enabled: true,
        tags: std::collections::BTreeSet::new(),
    }))
}

fn network(n: usize) -> Command {
    Command::Network(NetworkCommand::CreateNetwork(Box::new(new_network(&format!("n{n}")))))
}

fn subnet(n: usize) -> Command {
    let subnet = new_subnet(&format!("s{n}"), &format!("n{n}"), "10.1.0.0/24");
    Command::Network(NetworkCommand::CreateSubnet(Box::new(subnet)))
}

/// All in one network, so that its addresses are looked through too.
fn server(n: usize) -> Command {
    let mut new = new_server(&format!("i{n}"), None);
    new.flavor_id = "tiny".into();
    if let super::compute::PortSource::New { network_id, .. } = &mut new.networks[0].source {
        *network_id = "large".into();
    }
    super::fixture::placed(new, 1)
}

struct Growing {
    state: State,
    index: u64,
}

impl Growing {
    fn new() -> Self {
        let mut sample = Sample::new();
        sample.must(Command::Quota(QuotaCommand::Set {
            project_id: PROJECT.into(),
            limits: QuotaResource::ALL.into_iter().map(|resource| (resource, -1)).collect(),
        }));
        let mut tiny = flavor("tiny", 1, 1);
        tiny.root_gib = 0;
        sample.compute(ComputeCommand::CreateFlavor(Box::new(tiny)));
        sample.network(NetworkCommand::CreateNetwork(Box::new(new_network("large"))));
        let subnet = new_subnet("large", "large", "10.128.0.0/9");
        sample.network(NetworkCommand::CreateSubnet(Box::new(subnet)));
        let host = sample.state.cluster.hosts.get_mut(&HostId(1)).expect("the first host");
        host.capacity = super::cluster::Capacity { vcpus: 1 << 20, ram_mib: 1 << 40, disk_gib: 1 };
        Self { state: sample.state, index: 1_000 }
    }

    fn apply(&mut self, command: &Command) {
        self.index += 1;
        let id = u128::from(self.index).to_be_bytes();
        let outcome = self.state.apply(self.index, self.index, id, command);
        outcome.unwrap_or_else(|why| panic!("{command:?}: {why}"));
    }

    /// The nanoseconds of processor time that the commands took.
    fn cost_of(&mut self, commands: &[Command]) -> u64 {
        let before = processor_ns();
        commands.iter().for_each(|command| self.apply(command));
        processor_ns() - before
    }
}

/// The processor time of this thread so far. What else the machine does is not in it.
fn processor_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux shows it");
    let first = text.split(' ').next().expect("it has three numbers");
    first.parse().expect("it is a number")
}

#[test]
fn the_cost_of_a_creation_does_not_grow_with_what_is_there() {
    let mut growing = Growing::new();
    for (kind, make) in [
        ("project", project as fn(usize) -> Command),
        ("network", network),
        ("subnet", subnet),
        ("server", server),
    ] {
        let commands: Vec<Command> = (0..OBJECTS).map(make).collect();
        let chunks: Vec<&[Command]> = commands.chunks(OBJECTS / CHUNKS).collect();
        let costs: Vec<u64> = chunks.iter().map(|chunk| growing.cost_of(chunk)).collect();
        let (first, last) = (costs[0], costs[CHUNKS - 1]);
        // A walk makes it nineteen times as much; a tree one level deeper, next to nothing.
        assert!(last < first * 6, "{kind}: from {first} to {last} ns");
    }
    growing.state.check_invariants().expect("it holds together");
    assert_eq!(growing.state.compute.servers.len(), OBJECTS);
}
