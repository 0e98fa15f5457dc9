//! What clients ask for, drawn from what they see.

use std::collections::{BTreeMap, BTreeSet};

use controller::ids::{HostId, PortId, ServerId, VolumeId};
use controller::state::cluster::ClusterCommand;
use controller::state::compute::{ComputeCommand, NewServer, NewServerPort, PortSource};
use controller::state::network::{NetworkCommand, NewPort};
use controller::state::volume::{NewVolume, VolumeCommand};
use controller::state::{Command, QuotaCommand, QuotaResource, State};
use tests::random::Random;

use crate::setup::{IMAGE, NETWORK, PROJECT, USER};

/// The next thing that a client wants; nothing where what it thought of isn't there.
pub(crate) fn next(random: &mut Random, state: &State) -> Option<Command> {
    let servers: Vec<ServerId> = state.compute.servers.keys().cloned().collect();
    let volumes: Vec<VolumeId> = state.volume.volumes.keys().cloned().collect();
    let server = |random: &mut Random| (!servers.is_empty()).then(|| random.pick(&servers).clone());
    let volume = |random: &mut Random| (!volumes.is_empty()).then(|| random.pick(&volumes).clone());
    Some(match random.below(100) {
        0..=21 => compute(ComputeCommand::CreateServer(Box::new(new_server(random)))),
        22..=33 => compute(ComputeCommand::DeleteServer(server(random)?)),
        34..=39 => compute(ComputeCommand::StopServer(server(random)?)),
        40..=45 => compute(ComputeCommand::StartServer(server(random)?)),
        46..=49 => compute(ComputeCommand::RebootServer(server(random)?)),
        50..=59 => Command::Volume(VolumeCommand::Create(Box::new(new_volume(random)))),
        60..=64 => Command::Volume(VolumeCommand::Delete(volume(random)?)),
        65..=80 => Command::Volume(VolumeCommand::Attach {
            volume_id: volume(random)?,
            server_id: server(random)?,
            attachment_id: name(random).into(),
            device: None,
            tag: None,
            delete_on_termination: random.chance(15),
        }),
        81..=89 => {
            let volume = state.volume.volumes.get(&volume(random)?)?;
            Command::Volume(VolumeCommand::Detach {
                volume_id: volume.id.clone(),
                server_id: volume.attachments.first()?.server_id.clone(),
            })
        }
        90..=92 => Command::Network(NetworkCommand::CreatePort(Box::new(new_port(random)))),
        93..=95 => {
            let ports: Vec<PortId> = state.network.ports.keys().cloned().collect();
            let port = (!ports.is_empty()).then(|| random.pick(&ports).clone())?;
            Command::Network(NetworkCommand::DeletePort(port))
        }
        96 => compute(ComputeCommand::EvacuateServer {
            id: server(random)?,
            requested_host: None,
            placement: None,
            stop: random.chance(20),
        }),
        97 => Command::Cluster(ClusterCommand::SetHostService {
            id: HostId(random.between(1, 3)),
            disabled: Some(random.chance(20)),
            disabled_reason: None,
            forced_down: None,
            evacuate: None,
        }),
        _ => Command::Quota(QuotaCommand::Set {
            project_id: PROJECT.into(),
            limits: vec![
                (QuotaResource::Instances, i64::try_from(random.between(4, 10)).unwrap_or(4)),
                (QuotaResource::Cores, i64::try_from(random.between(8, 14)).unwrap_or(8)),
            ],
        }),
    })
}

/// A command in few words.
pub(crate) fn words(command: &Command) -> String {
    match command {
        Command::Compute(ComputeCommand::CreateServer(new)) => format!("makes server {}", new.id),
        Command::Volume(VolumeCommand::Create(new)) => format!("makes volume {}", new.id),
        Command::Network(NetworkCommand::CreatePort(new)) => format!("makes port {}", new.id),
        Command::Compute(command) => format!("{command:?}"),
        Command::Volume(command) => format!("{command:?}"),
        other => format!("{other:?}"),
    }
}

fn compute(command: ComputeCommand) -> Command {
    Command::Compute(command)
}

/// A short random name; ids of a run don't meet.
fn name(random: &mut Random) -> String {
    format!("{:012x}", random.draw() >> 16)
}

fn new_server(random: &mut Random) -> NewServer {
    let id = format!("s-{}", name(random));
    NewServer {
        id: id.as_str().into(),
        name: id.clone(),
        project_id: PROJECT.into(),
        user_id: USER.into(),
        description: None,
        image_id: IMAGE.into(),
        flavor_id: if random.chance(70) { "1".into() } else { "2".into() },
        key_name: None,
        metadata: BTreeMap::new(),
        tags: BTreeSet::new(),
        config_drive: true,
        user_data: None,
        availability_zone: None,
        requested_host: random.chance(10).then(|| format!("node{}", random.between(1, 3))),
        group_id: None,
        hostname: id.clone(),
        reservation_id: "r-1".into(),
        launch_index: 0,
        networks: vec![NewServerPort {
            port_id: format!("p-{id}").into(),
            source: PortSource::New { network_id: NETWORK.into(), fixed_ip: None },
            tag: None,
        }],
        security_groups: Vec::new(),
        placement: None,
    }
}

fn new_volume(random: &mut Random) -> NewVolume {
    let id = format!("v-{}", name(random));
    NewVolume {
        id: id.as_str().into(),
        name: id,
        description: None,
        project_id: PROJECT.into(),
        user_id: USER.into(),
        size_gib: random.between(1, 4),
        metadata: BTreeMap::new(),
        availability_zone: None,
        placement: None,
    }
}

fn new_port(random: &mut Random) -> NewPort {
    let id = format!("p-{}", name(random));
    NewPort {
        id: id.as_str().into(),
        network_id: NETWORK.into(),
        project_id: PROJECT.into(),
        name: id,
        description: String::new(),
        admin_state_up: true,
        mac_address: None,
        fixed_ips: None,
        port_security_enabled: None,
        security_groups: None,
        allowed_address_pairs: Vec::new(),
        device_id: String::new(),
        device_owner: String::new(),
        tags: BTreeSet::new(),
    }
}
