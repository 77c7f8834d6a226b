from fastnet.cli import main

main()
