from sigmix.cli.app import main

main()
