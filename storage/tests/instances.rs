//! Instance disks and config drives through the real control socket.

mod hosts;

use hosts::{Authority, Host, kind, pattern};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use storage::ErrorKind;

#[test]
fn a_root_disk_is_the_image_grown_and_stays_what_the_guest_made_it() {
    let mut host = Host::start(&Authority::new(), 1);
    let content = pattern(1 << 20);
    let image = host.import(&content).unwrap();
    let create = |host: &Host, size| host.client().create_root("s-1", &image.sha512, size);
    create(&host, 4 << 20).unwrap();
    let disk = host.client().open_root("s-1").unwrap();
    assert_eq!(disk.size_bytes, 4 << 20);
    let disk = File::from(disk.descriptor);
    let mut found = vec![0; 4 << 20];
    disk.read_exact_at(&mut found, 0).unwrap();
    assert!(found[..1 << 20] == content && found[1 << 20..].iter().all(|byte| *byte == 0));
    disk.write_all_at(b"guest", 100).unwrap();
    host.restart();
    create(&host, 4 << 20).unwrap();
    let disk = File::from(host.client().open_root("s-1").unwrap().descriptor);
    let mut found = [0; 5];
    disk.read_exact_at(&mut found, 100).unwrap();
    assert_eq!(&found, b"guest", "creating it again must not replace it");
    assert_eq!(kind(create(&host, 8 << 20)), ErrorKind::Exists);
    let mut source = Vec::new();
    let image = host.client().read_image(&image.sha512).unwrap();
    File::from(image.descriptor).read_to_end(&mut source).unwrap();
    assert!(source == content, "the image must not change with the disk");
}

#[test]
fn a_root_disk_needs_its_image_and_room_for_it() {
    let host = Host::start(&Authority::new(), 1);
    let image = host.import(&pattern(8192)).unwrap();
    let mut client = host.client();
    assert_eq!(kind(client.create_root("s", &"0".repeat(128), 8192)), ErrorKind::NotFound);
    assert_eq!(kind(client.create_root("s", &image.sha512, 4096)), ErrorKind::Invalid);
    assert_eq!(kind(client.create_root("../s", &image.sha512, 8192)), ErrorKind::Invalid);
    assert_eq!(kind(client.create_root("s", &image.sha512, 1000)), ErrorKind::Invalid);
    assert_eq!(kind(client.open_root("s")), ErrorKind::NotFound);
    assert_eq!((host.entries("instances"), host.entries("staging")), (0, 0));
}

#[test]
fn deleting_a_server_takes_its_disk_and_config_drive() {
    let host = Host::start(&Authority::new(), 1);
    let image = host.import(&pattern(8192)).unwrap();
    let mut client = host.client();
    client.create_root("s", &image.sha512, 8192).unwrap();
    client.write_config_drive("s", &BTreeMap::new()).unwrap();
    assert_eq!(host.entries("instances/s"), 2);
    client.delete_root("s").unwrap();
    client.delete_root("s").unwrap();
    assert_eq!((host.entries("instances"), host.entries("staging")), (0, 0));
}

#[test]
fn a_config_drive_is_found_by_label_and_read_by_its_full_names() {
    let host = Host::start(&Authority::new(), 1);
    let files = BTreeMap::from([
        ("openstack/latest/meta_data.json".to_owned(), b"{\"uuid\": \"s\"}".to_vec()),
        ("openstack/latest/network_data.json".to_owned(), pattern(5000)),
        ("openstack/latest/user_data".to_owned(), vec![]),
    ]);
    let mut client = host.client();
    client.write_config_drive("s", &BTreeMap::new()).unwrap();
    let drive = client.write_config_drive("s", &files).unwrap();
    let mut image = Vec::new();
    File::from(drive.descriptor).read_to_end(&mut image).unwrap();
    assert_eq!(image.len() as u64, drive.size_bytes);
    assert_eq!(&image[0x8001..0x8006], b"CD001");
    assert_eq!(&image[0x8028..0x8048], b"config-2                        ");
    let iso = iso::Joliet::new(&image);
    for (path, content) in &files {
        assert_eq!(iso.read(path).as_deref(), Some(content.as_slice()), "{path}");
    }
    assert_eq!(iso.read("openstack/latest/vendor_data.json"), None);
}

#[test]
fn the_kernels_own_driver_reads_a_config_drive() {
    let host = Host::start(&Authority::new(), 1);
    let path = "openstack/latest/vendor_data2.json";
    let files = BTreeMap::from([(path.to_owned(), pattern(3000))]);
    host.client().write_config_drive("s", &files).unwrap();
    let image = host.directory().join("instances/s/config.iso");
    let mount_point = host.place.path().join("mounted");
    std::fs::create_dir(&mount_point).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-o", "loop,ro"])
        .args([&image, &mount_point])
        .output();
    // Needs privilege and loop devices: without them the test above is what there is.
    if !mounted.is_ok_and(|output| output.status.success()) {
        return;
    }
    let read = std::fs::read(mount_point.join(path));
    let unmounted = std::process::Command::new("umount").arg(&mount_point).status().unwrap();
    assert!(unmounted.success());
    assert!(read.unwrap() == pattern(3000));
}

/// A reader of Joliet directories that shares nothing with the writer.
mod iso {
    const SECTOR: usize = 2048;

    pub(crate) struct Joliet<'a> {
        image: &'a [u8],
        root: (usize, usize),
    }

    fn u32_at(bytes: &[u8], offset: usize) -> usize {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()) as usize
    }

    impl<'a> Joliet<'a> {
        pub(crate) fn new(image: &'a [u8]) -> Self {
            let descriptor = (16..)
                .map(|sector| &image[sector * SECTOR..][..SECTOR])
                .take_while(|descriptor| descriptor[0] != 255)
                .find(|descriptor| descriptor[0] == 2 && &descriptor[88..90] == b"%/")
                .expect("a supplementary descriptor of Joliet");
            let root = (u32_at(descriptor, 158), u32_at(descriptor, 166));
            Self { image, root }
        }

        pub(crate) fn read(&self, path: &str) -> Option<Vec<u8>> {
            let mut found = self.root;
            for name in path.split('/') {
                found = self.entry(found, name)?;
            }
            Some(self.image[found.0 * SECTOR..][..found.1].to_vec())
        }

        fn entry(&self, (sector, length): (usize, usize), name: &str) -> Option<(usize, usize)> {
            let directory = &self.image[sector * SECTOR..][..length];
            let mut at = 0;
            while at < directory.len() {
                let record = usize::from(directory[at]);
                if record == 0 {
                    at = (at / SECTOR + 1) * SECTOR;
                    continue;
                }
                let entry = &directory[at..at + record];
                let units: Vec<u16> = entry[33..33 + usize::from(entry[32])]
                    .chunks_exact(2)
                    .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
                    .collect();
                let found = String::from_utf16(&units).unwrap();
                if found.trim_end_matches(";1") == name {
                    return Some((u32_at(entry, 2), u32_at(entry, 10)));
                }
                at += record;
            }
            None
        }
    }
}
