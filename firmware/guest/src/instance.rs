//! Who this guest is and what it shall do: config drive and metadata service.

use crate::disks::{Disk, DiskReader};
use crate::http_client;
use crate::network::METADATA_ADDRESS;
use crate::world::World;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use inputs::http::{Response, Url};
use inputs::iso9660::{IsoError, Volume};
use inputs::json;
use runtime::{clock, println};

const CONFIG_DRIVE_LABEL: &str = "config-2";
const META_DATA: &str = "openstack/latest/meta_data.json";
const USER_DATA: &str = "openstack/latest/user_data";
/// How long the metadata service may take to answer.
const METADATA_MICROS_MAX: u64 = 10_000_000;

/// Prints what config drive and metadata say, and returns the user data: from the config drive
/// where there is one, else from the metadata service.
pub(crate) fn read(world: &mut World, network: Result<(), &'static str>) -> Option<Vec<u8>> {
    let drive = find_config_drive(world);
    match drive {
        None => println!("trine: no config drive"),
        Some(slot) => match drive_uuid(world, slot) {
            Ok(uuid) => println!("trine: config-drive {uuid}"),
            Err(reason) => println!("trine: config-drive failed {reason}"),
        },
    }
    let metadata = network.map_err(ToString::to_string).and_then(|()| metadata(world));
    match &metadata {
        Ok((uuid, hostname)) => println!("trine: metadata {uuid} {hostname}"),
        Err(reason) => println!("trine: metadata failed {reason}"),
    }
    match drive {
        Some(slot) => read_drive(world, slot, USER_DATA).unwrap_or_else(|reason| {
            println!("trine: user_data failed {reason}");
            None
        }),
        None if metadata.is_ok() => fetch_user_data(world),
        None => None,
    }
}

fn find_config_drive(world: &mut World) -> Option<u16> {
    let slots: Vec<u16> = world.disks.iter().map(Disk::slot).collect();
    slots.into_iter().find(|slot| {
        Volume::open(DiskReader { world, slot: *slot })
            .is_ok_and(|volume| volume.label().eq_ignore_ascii_case(CONFIG_DRIVE_LABEL))
    })
}

/// A file of the config drive; `None` where it has none of that name.
fn read_drive(world: &mut World, slot: u16, path: &str) -> Result<Option<Vec<u8>>, String> {
    let read = Volume::open(DiskReader { world, slot }).and_then(|mut volume| volume.read(path));
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(IsoError::NotFound) => Ok(None),
        Err(error) => Err(alloc::format!("{path}: {error}")),
    }
}

fn drive_uuid(world: &mut World, slot: u16) -> Result<String, String> {
    let bytes = read_drive(world, slot, META_DATA)?
        .ok_or_else(|| alloc::format!("{META_DATA}: no such file"))?;
    string_of(&bytes, "uuid")
}

fn string_of(bytes: &[u8], member: &str) -> Result<String, String> {
    core::str::from_utf8(bytes)
        .ok()
        .and_then(|text| json::string_member(text, member))
        .ok_or_else(|| alloc::format!("{META_DATA} has no {member}"))
}

fn url(path: &str) -> Url {
    Url { address: METADATA_ADDRESS.octets(), port: 80, path: alloc::format!("/{path}") }
}

fn metadata(world: &mut World) -> Result<(String, String), String> {
    let deadline = clock::now().after_micros(METADATA_MICROS_MAX);
    http_client::get(world, &url(META_DATA), deadline, |response| {
        expect_ok(response)?;
        Ok((string_of(&response.body, "uuid")?, string_of(&response.body, "hostname")?))
    })
}

fn expect_ok(response: &Response) -> Result<(), String> {
    if response.status == 200 { Ok(()) } else { Err(alloc::format!("status {}", response.status)) }
}

fn fetch_user_data(world: &mut World) -> Option<Vec<u8>> {
    let deadline = clock::now().after_micros(METADATA_MICROS_MAX);
    let fetched = http_client::get(world, &url(USER_DATA), deadline, |response| {
        if response.status == 404 {
            return Ok(None);
        }
        expect_ok(response).map(|()| Some(response.body.clone()))
    });
    fetched.unwrap_or_else(|reason| {
        println!("trine: user_data failed {reason}");
        None
    })
}
