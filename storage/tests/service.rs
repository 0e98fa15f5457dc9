//! A storage process as others see it: starting, refusing, and what strangers send it.

mod hosts;

use hosts::{Authority, CLUSTER, Host};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use storage::{Service, StartError, StorageConfig};

fn refused(config: StorageConfig) -> StartError {
    match Service::start(config) {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

#[test]
fn a_taken_directory_address_or_socket_is_named() {
    let authority = Authority::new();
    let (host, other) = (Host::start(&authority, 1), Host::start(&authority, 2));
    let config = StorageConfig { control: host.place.path().join("c2"), ..host.config() };
    assert!(matches!(refused(config), StartError::DirectoryTaken { .. }));
    let directory = host.place.path().join("other");
    let config = StorageConfig { directory: directory.clone(), ..host.config() };
    assert!(matches!(refused(config), StartError::Control { .. }));
    let listen = other.peer().address;
    let control = host.place.path().join("c2");
    let config = StorageConfig { directory, listen, control, ..host.config() };
    assert!(matches!(refused(config.clone()), StartError::Listen { .. }));
    let everywhere = StorageConfig { listen: ([0, 0, 0, 0], 0).into(), ..config };
    assert!(matches!(refused(everywhere), StartError::Wildcard(_)));
    host.client().status().unwrap();
}

#[test]
fn another_clusters_directory_is_refused() {
    let mut host = Host::start(&Authority::new(), 1);
    host.stop();
    let config = StorageConfig { cluster_id: "ffff".to_owned(), ..host.config() };
    assert!(
        matches!(refused(config), StartError::ForeignCluster { found, .. } if found == CLUSTER)
    );
}

#[test]
fn the_control_socket_and_all_data_are_the_owners_alone() {
    let host = Host::start(&Authority::new(), 1);
    host.client().create_volume("v", 512).unwrap();
    let mode = |path: &str| {
        std::fs::metadata(host.place.path().join(path)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("control"), 0o600);
    assert_eq!(mode("storage"), 0o700);
    assert_eq!(mode("storage/volumes/v/data"), 0o600);
}

#[test]
fn a_status_names_the_instance_and_measures_the_disk() {
    let mut host = Host::start(&Authority::new(), 1);
    let first = host.client().status().unwrap();
    assert!(first.fdatasync_p50_us > 0 && first.free_bytes > 0);
    assert!(first.free_bytes <= first.total_bytes);
    host.restart();
    assert_ne!(host.client().status().unwrap().instance, first.instance);
}

#[test]
fn nonsense_on_the_control_socket_is_answered_and_the_next_request_works() {
    let host = Host::start(&Authority::new(), 1);
    let socket = UnixStream::connect(host.place.path().join("control")).unwrap();
    for message in [
        &b"not json"[..],
        br#"{"version": 2, "request": "status"}"#,
        br#"{"version": 1, "request": {"format_disk": {}}}"#,
        br#"{"version": 1, "request": {"import_image": {"image_id": "i", "disk_format": "raw", "size_limit_bytes": 1}}}"#,
    ] {
        abi::control::send(&socket, message, &[]).unwrap();
        let (reply, _) = abi::control::receive(&socket).unwrap().unwrap();
        let reply = String::from_utf8(reply).unwrap();
        assert!(reply.starts_with(r#"{"error":{"kind":"invalid""#), "{reply}");
    }
    abi::control::send(&socket, br#"{"version": 1, "request": "list_volumes"}"#, &[]).unwrap();
    let (reply, _) = abi::control::receive(&socket).unwrap().unwrap();
    assert_eq!(reply, br#"{"volumes":{"volumes":[]}}"#);
}

fn greet(host: &Host) -> TcpStream {
    let mut stream = TcpStream::connect(host.peer().address).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat()
}

#[test]
fn nothing_is_told_or_opened_without_tls() {
    let host = Host::start(&Authority::new(), 1);
    let image = host.import(b"secret").unwrap();
    let mut stream = greet(&host);
    let name = format!("image/{}", image.sha512);
    let length = (name.len() as u32).to_be_bytes();
    let go = [&length[..], name.as_bytes(), &[0, 0]].concat();
    for (number, data) in [(3, &b""[..]), (6, &go), (7, &go), (8, b"")] {
        stream.write_all(&option(number, data)).unwrap();
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[12..16], ((1u32 << 31) | 5).to_be_bytes(), "option {number}");
        let length = u32::from_be_bytes(reply[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize]).unwrap();
    }
    stream.write_all(&option(1, name.as_bytes())).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "EXPORT_NAME without TLS is answered by hanging up");
}

#[test]
fn random_bytes_at_every_stage_harm_nothing() {
    let host = Host::start(&Authority::new(), 1);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |length: usize| -> Vec<u8> {
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..length).map(|_| next()).collect()
    };
    for round in 0..60 {
        let mut stream = if round % 3 == 0 {
            TcpStream::connect(host.peer().address).unwrap()
        } else {
            greet(&host)
        };
        if round % 3 == 2 {
            stream.write_all(&option(5, b"")).unwrap();
            stream.read_exact(&mut [0; 20]).unwrap();
        }
        // The other side may hang up at the first wrong byte.
        let _ = stream.write_all(&random(1 + round * 7));
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    host.client().status().unwrap();
}
