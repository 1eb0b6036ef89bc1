use std::fs;

use super::*;

/// A machine with a disk of two partitions, the second in a mapped device, and a loop device on `image`.
fn machine(image: &Path) -> (tempfile::TempDir, System) {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write(
        "proc/self/mountinfo",
        "22 1 8:1 / /mnt/with\\040blank rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
         23 1 253:0 / /mnt/mapped ro - xfs /dev/mapper/a rw\n\
         24 1 7:0 / /mnt/image ro,relatime - ext4 /dev/loop0 ro,norecovery\n\
         25 1 0:30 / /mnt/data rw - btrfs /no/such/device rw\n\
         a line that is none\n",
    );
    write("sys/dev/block/8:0/sda1/partition", "1\n");
    write("sys/dev/block/8:0/sda1/dev", "8:1\n");
    write("sys/dev/block/8:0/sda2/partition", "2\n");
    write("sys/dev/block/8:0/sda2/dev", "8:2\n");
    write("sys/dev/block/8:0/queue/depth", "no partition");
    write("sys/dev/block/8:2/holders/dm-0/dev", "253:0\n");
    write("sys/block/loop0/loop/backing_file", &format!("{}\n", image.display()));
    write("sys/block/loop0/dev", "7:0\n");
    write("sys/block/loop1/dev", "7:1\n");
    write("sys/block/sda/dev", "8:0\n");
    let system = System::at(root.path().join("proc"), root.path().join("sys"));
    (root, system)
}

fn uses_of_device(system: &System, number: &str) -> Vec<String> {
    let mut search = Search::new(system).unwrap();
    search.device(number.parse().unwrap(), None).unwrap();
    search.uses.iter().map(ToString::to_string).collect()
}

#[test]
fn a_disk_is_in_use_through_its_partitions_and_what_is_made_of_them() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let (_root, system) = machine(image.path());
    assert_eq!(
        uses_of_device(&system, "8:0"),
        ["mounted at /mnt/mapped", "mounted at /mnt/with blank", "part of /dev/dm-0"]
    );
    assert_eq!(uses_of_device(&system, "8:1"), ["mounted at /mnt/with blank"]);
    assert!(uses_of_device(&system, "8:16").is_empty());
}

#[test]
fn a_file_is_in_use_through_its_loop_device() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let (_root, system) = machine(image.path());
    let uses = system.uses(image.path()).unwrap();
    assert_eq!(
        uses,
        [
            Use::Mounted { at: "/mnt/image".into(), read_only: true },
            Use::Loop { name: "loop0".to_owned() },
        ]
    );
    assert_eq!(uses.iter().map(Use::may_write).collect::<Vec<_>>(), [false, true]);
    let link = image.path().with_extension("link");
    std::os::unix::fs::symlink(image.path(), &link).unwrap();
    assert_eq!(system.uses(&link).unwrap(), uses);
    fs::remove_file(link).unwrap();

    let other = tempfile::NamedTempFile::new().unwrap();
    assert!(system.uses(other.path()).unwrap().is_empty());
}

#[test]
fn a_file_is_in_use_as_swap() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let (root, system) = machine(Path::new("/nowhere"));
    let table =
        format!("Filename Type Size Used Priority\n{} file 1024 0 -2\n", image.path().display());
    fs::write(root.path().join("proc/swaps"), table).unwrap();
    assert_eq!(system.uses(image.path()).unwrap(), [Use::Swap]);
}

#[test]
fn a_read_only_bind_mount_of_a_written_file_system_counts_as_written() {
    let mount = Mount::parse(b"1 2 8:1 / /at ro - ext4 /dev/sda1 rw,errors=continue").unwrap();
    assert!(!mount.read_only);
    let mount = Mount::parse(b"1 2 8:1 / /at rw master:3 - ext4 /dev/sda1 ro").unwrap();
    assert!(mount.read_only);
}

#[test]
fn escapes_of_the_kernel() {
    assert_eq!(unescape(br"a\040b\134\1x"), OsStr::new(r"a b\\1x"));
}

#[test]
fn this_machine_can_be_read() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(System::default().uses(file.path()).unwrap().is_empty());
    assert!(System::default().uses(Path::new("/dev/null")).unwrap().is_empty());
    assert!(System::default().uses(Path::new("/no/such/file")).is_err());
}
